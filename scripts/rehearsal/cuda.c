/* A libcuda.so.1 with no device, so that vLLM's compiled library can be loaded without a driver.
 *
 * Its functions are those whose addresses vLLM's library asks for when it is loaded; each answers
 * CUDA_ERROR_NO_DEVICE, and so does everything of CUDA that is called after all.
 */
enum { NO_DEVICE = 100 };

int cuInit(unsigned flags) { (void)flags; return NO_DEVICE; }
int cuGetProcAddress_v2(void) { return NO_DEVICE; }
int cuPointerGetAttribute(void) { return NO_DEVICE; }
int cuTensorMapEncodeTiled(void) { return NO_DEVICE; }
