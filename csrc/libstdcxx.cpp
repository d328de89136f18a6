// What newer versions of GCC call in libstdc++ and older systems' libstdc++ does not have: the module brings
// its own, so that it asks for no more than GCC 8's, which all systems of the last years have.
#include <new>

#ifdef __GLIBCXX__
namespace std {

// Called by std::allocator of GCC 11 and later, in libstdc++ since GLIBCXX_3.4.29.
[[noreturn]] void __throw_bad_array_new_length() { throw bad_array_new_length(); }

}  // namespace std
#endif
