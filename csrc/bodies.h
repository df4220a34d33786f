// All kernels of one instruction set, in order. Included once per file, inside its anonymous namespace, after Vec.
#include "multiply_body.h"
#include "fold_body.h"
#include "gaussian_blur_body.h"
#include "store_body.h"
#include "table_body.h"
