/* The compiled core: one translation unit, built once for each instruction set. See kernels.h for what it does. */
#include "kernels.h"
#include "vectors.h"

#include "threads.h"

#include "panels.h"

#include "linear.h"

#include "pool.h"

#include "conv.h"

#include "conv_pool.h"

#include "layouts.h"

#include "loss.h"

#include "run.h"

#include "windows.h"

#include "windows_pool.h"

#include "windows_flat.h"

#include "windows_depth.h"

#include "windows_dense.h"

#include "norms.h"

#include "gates.h"

extern "C" int32_t nk_abi(void) { return NK_ABI; }

extern "C" int32_t nk_lanes(void) { return LANES; }

extern "C" int32_t nk_threads(int32_t count) {
  if (count < 1 || count > nk::CREW_MAX) return NK_SHAPE;
  nk::crew.wanted = count;
  return NK_OK;
}
