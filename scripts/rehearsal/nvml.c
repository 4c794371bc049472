/* A libnvidia-ml.so.1 whose GPUs stand in a text file, named by the variable NVML_STUB.
 *
 * Lines, their fields apart by tabs (cases.Case.described writes them):
 *   driver   VERSION  CUDA            CUDA as NVML counts it: 1000 major + 10 minor
 *   gpu      NAME  UUID  TOTAL  USED  MAJOR  MINOR  MIG  ENERGY
 *            bytes; MIG: 0 off, 1 on, -1 the GPU has none; ENERGY: millijoules, -1 not counted
 *   slice    NAME  UUID  TOTAL  USED  a MIG slice of the GPU above it
 * Names, arguments and error numbers are those of NVIDIA's NVML API reference.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, NO_DRIVER = 9 };
enum { MOST = 64, LENGTH = 96 };

typedef struct {
    char name[LENGTH], uuid[LENGTH];
    unsigned long long total, used;
    int major, minor, mig;
    long long energy;
    int index, parent; /* parent: the GPU of which this is a slice, or -1 */
} Device;
typedef Device *Handle;

static Device devices[MOST];
static char driver[LENGTH];
static int found, gpus, cuda;

static int load(void) {
    char line[512];
    const char *place = getenv("NVML_STUB");
    FILE *file = place ? fopen(place, "r") : NULL;
    if (!file) return NO_DRIVER;
    found = gpus = 0;
    while (fgets(line, sizeof line, file) && found < MOST) {
        Device d = {.mig = -1, .energy = -1, .parent = -1};
        if (sscanf(line, "driver\t%95[^\t]\t%d", driver, &cuda) == 2) continue;
        if (sscanf(line, "gpu\t%95[^\t]\t%95[^\t]\t%llu\t%llu\t%d\t%d\t%d\t%lld", d.name, d.uuid,
                   &d.total, &d.used, &d.major, &d.minor, &d.mig, &d.energy) == 8) {
            d.index = gpus++;
        } else if (sscanf(line, "slice\t%95[^\t]\t%95[^\t]\t%llu\t%llu", d.name, d.uuid,
                          &d.total, &d.used) == 4 && gpus) {
            d.index = d.parent = gpus - 1;
        } else {
            continue;
        }
        devices[found++] = d;
    }
    fclose(file);
    return SUCCESS;
}

int nvmlInit(void) { return load(); }
int nvmlInit_v2(void) { return load(); }
int nvmlInitWithFlags(unsigned flags) { (void)flags; return load(); }
int nvmlShutdown(void) { return SUCCESS; }

const char *nvmlErrorString(int error) {
    return error == NO_DRIVER ? "Driver Not Loaded" : error == NOT_FOUND ? "Not Found"
         : error == NOT_SUPPORTED ? "Not Supported" : "Invalid Argument";
}

static int text(const char *from, char *to, unsigned length) {
    return snprintf(to, length, "%s", from) < (int)length ? SUCCESS : INVALID;
}

int nvmlSystemGetDriverVersion(char *to, unsigned length) { return text(driver, to, length); }
int nvmlSystemGetCudaDriverVersion(int *to) { *to = cuda; return SUCCESS; }
int nvmlSystemGetCudaDriverVersion_v2(int *to) { *to = cuda; return SUCCESS; }

int nvmlDeviceGetCount_v2(unsigned *to) { *to = gpus; return SUCCESS; }

static int nth(int parent, unsigned index, Handle *to) {
    for (int i = 0; i < found; i++)
        if (devices[i].parent == parent && index-- == 0) {
            *to = &devices[i];
            return SUCCESS;
        }
    return parent < 0 ? INVALID : NOT_FOUND;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, Handle *to) { return nth(-1, index, to); }

int nvmlDeviceGetHandleByUUID(const char *uuid, Handle *to) {
    for (int i = 0; i < found; i++)
        if (!strcmp(devices[i].uuid, uuid)) {
            *to = &devices[i];
            return SUCCESS;
        }
    return NOT_FOUND;
}

int nvmlDeviceGetIndex(Handle d, unsigned *to) { *to = d->index; return SUCCESS; }
int nvmlDeviceGetName(Handle d, char *to, unsigned length) { return text(d->name, to, length); }
int nvmlDeviceGetUUID(Handle d, char *to, unsigned length) { return text(d->uuid, to, length); }

int nvmlDeviceGetCudaComputeCapability(Handle d, int *major, int *minor) {
    if (d->parent >= 0) return INVALID;
    *major = d->major;
    *minor = d->minor;
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(Handle d, unsigned long long *to) {
    to[0] = d->total;
    to[1] = d->total - d->used;
    to[2] = d->used;
    return SUCCESS;
}

int nvmlDeviceGetMigMode(Handle d, unsigned *now, unsigned *pending) {
    if (d->mig < 0) return NOT_SUPPORTED;
    *now = *pending = d->mig;
    return SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(Handle d, unsigned *to) {
    *to = d->mig < 0 ? 0 : 7;
    return SUCCESS;
}

int nvmlDeviceGetMigDeviceHandleByIndex(Handle d, unsigned index, Handle *to) {
    return nth(d->index, index, to);
}

int nvmlDeviceGetTotalEnergyConsumption(Handle d, unsigned long long *to) {
    if (d->energy < 0) return NOT_SUPPORTED;
    *to = d->energy;
    return SUCCESS;
}

int nvmlDeviceGetP2PStatus(Handle one, Handle other, int what, int *to) {
    (void)one, (void)other, (void)what;
    *to = 5; /* NVML_P2P_STATUS_NOT_SUPPORTED: no NVLink */
    return SUCCESS;
}
