// A libcuda.so.1 of which nothing runs: every entry point that Triton's driver and launcher call succeeds.
#include <stdint.h>
#include <string.h>

static int64_t launches = 0;
int64_t bench_launches(void) { return launches; }

static const char *no_error = "";
int cuGetErrorString(int error, const char **text) { *text = no_error; return 0; }
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 1 << 16; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = &launches; return 0; }
int cuCtxGetCurrent(void **context) { *context = &launches; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxGetLimit(size_t *value, int limit) { *value = 0; return 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = &launches; return 0; }
int cuModuleUnload(void *module) { return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = &launches; return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = 1024; return 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *function, int config) { return 0; }
int cuOccupancyMaxActiveClusters(int *clusters, void *function, const void *config) { *clusters = 1; return 0; }
// Leaves the pointer that it was asked about as it is.
int cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) { return 0; }
int cuPointerGetAttributes(unsigned n, int *attributes, void **data, uint64_t pointer) { return 0; }
int cuStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cuTensorMapEncodeTiled(void *map) { return 1; }
int cuTensorMapEncodeIm2col(void *map) { return 1; }
int cuLaunchKernelEx(const void *config, void *function, void **params, void **extra) { launches++; return 0; }
