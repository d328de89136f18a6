// Python's header, first of all headers as it asks, and with its sizes as Py_ssize_t.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>
