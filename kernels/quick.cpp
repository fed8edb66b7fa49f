// QUICK on x86-64: affine weights, as one stream of codes that every instruction set reads without a shuffle.
#include "lanes.h"
#include "digits.h"
#include "codes.h"
#include "gemm.h"
