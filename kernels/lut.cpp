// LUT-GEMM on x86-64: binary weights, few rows of x by look-ups of four columns, more plane by plane.
#include "lanes.h"
#include "digits.h"
#include "codes.h"
#include "gemm.h"
