// What the stub libraries share, and what a test reads and sets through ctypes. All of it lives in the stub runtime.
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

// Counted since the process began.
extern long null_launches;          // kernels of torch
extern long null_copies;            // from device to device
extern long null_fills;             // memory set to a value
extern long null_uploads;           // from the host
extern long null_downloads;         // to the host
extern long null_synchronizations;  // the host waited: for a stream, an event, the device, or a copy
extern long null_convolutions;      // forward, and each gradient
extern long null_products;          // of matrices

// Memory of the card, in bytes.
extern long null_total;
extern long null_torch;    // held by torch's allocator
extern long null_context;  // held by this process's CUDA context, once there is one
extern long null_outside;  // held by other libraries of this process; a test sets it
extern long null_other;    // held by other processes; a test sets it at any time, NULL_OTHER at the start
extern long null_most;     // the most that this process has held; a test may set it back to 0
extern long null_refuse;   // while it is not 0, no memory is given: a test sets it to force an out-of-memory

extern int null_major, null_minor;  // compute capability, from NULL_CC ("86")

long null_free(void);

#ifdef __cplusplus
}
#endif
