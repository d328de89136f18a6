// The C++ kernels as a program of its own, for a processor that this machine has not: an emulator runs it,
// and tests/support/foreign.py hands it the calls that `mmfast._cpu` would get.
//
// It answers requests on stdin one after the other: a function, memory, arguments; an argument, or a word of
// the memory, may be an address in that memory. The answer is a status, the results, and the memory as the
// call left it. Each piece of memory ends where a page ends, and nothing lies behind it: what is read beyond
// ends the program.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "registry.h"

extern "C" const mmfast::Entry* const __start_mmfast_ops[];
extern "C" const mmfast::Entry* const __stop_mmfast_ops[];

namespace {

void read_all(void* target, size_t size) {
  if (size != 0 && std::fread(target, 1, size, stdin) != size) std::_Exit(0);
}
template <class T>
T read() {
  T value;
  read_all(&value, sizeof value);
  return value;
}
template <class T>
void write(T value) {
  std::fwrite(&value, sizeof value, 1, stdout);
}

class Memory {
 public:
  explicit Memory(int64_t size) : size_(size) {
    const int64_t page = sysconf(_SC_PAGESIZE), whole = (size + page - 1) / page * page;
    length_ = whole + page;
    base_ = static_cast<char*>(
        mmap(nullptr, length_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(base_ + whole, page, PROT_NONE);
    data_ = base_ + whole - size;
    read_all(data_, size);
  }
  Memory(Memory&& other)
      : base_(other.base_), data_(other.data_), size_(other.size_), length_(other.length_) {
    other.base_ = nullptr;
  }
  ~Memory() {
    if (base_ != nullptr) munmap(base_, length_);
  }
  char* data() const { return data_; }
  void write() const { std::fwrite(data_, 1, size_, stdout); }

 private:
  char *base_, *data_;
  int64_t size_, length_;
};

// What can be called, for the names to be made functions of.
void list() {
  write<int64_t>(__stop_mmfast_ops - __start_mmfast_ops);
  for (auto entry = __start_mmfast_ops; entry != __stop_mmfast_ops; ++entry) {
    write<int64_t>(std::strlen((*entry)->name));
    std::fwrite((*entry)->name, 1, std::strlen((*entry)->name), stdout);
    write<int64_t>((*entry)->num_arguments);
    std::fwrite((*entry)->is_real, 1, (*entry)->num_arguments, stdout);
  }
}

void call(const mmfast::Entry& entry) {
  std::vector<Memory> memory;
  for (int64_t left = read<int64_t>(); left > 0; --left) memory.emplace_back(read<int64_t>());
  for (int64_t left = read<int64_t>(); left > 0; --left) {
    const auto piece = read<int64_t>(), offset = read<int64_t>(), target = read<int64_t>(),
               rest = read<int64_t>();
    const int64_t address = reinterpret_cast<int64_t>(memory[target].data()) + rest;
    std::memcpy(memory[piece].data() + offset, &address, sizeof address);
  }
  std::vector<mmfast::Argument> arguments(entry.num_arguments + 1);
  for (int i = 0; i < entry.num_arguments; ++i) {
    // The piece of memory that the argument, an offset, points into, or -1.
    const auto piece = read<int64_t>();
    read_all(&arguments[i], sizeof arguments[i]);
    if (piece >= 0) arguments[i].integer += reinterpret_cast<int64_t>(memory[piece].data());
  }
  std::vector<int64_t> results(entry.num_results + 1);
  std::string error;
  try {
    entry.call(arguments.data(), results.data());
  } catch (const std::exception& found) {
    error = found.what();
    if (error.empty()) error = "failed";
  }
  write<int64_t>(error.size());
  std::fwrite(error.data(), 1, error.size(), stdout);
  write<int64_t>(entry.num_results);
  std::fwrite(results.data(), sizeof results[0], entry.num_results, stdout);
  for (const auto& piece : memory) piece.write();
}

}  // namespace

int main() {
  list();
  std::fflush(stdout);
  for (;;) {
    const auto index = read<int64_t>();
    call(*__start_mmfast_ops[index]);
    std::fflush(stdout);
  }
}
