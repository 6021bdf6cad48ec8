// What tch does not wrap: autocast on the CPU, and one gradient of a convolution without the other.

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <cstdio>

extern "C" {

// As torch.autocast("cpu", torch.bfloat16) begins and ends, its cache of cast weights included.
void peer_autocast(bool on) {
  at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
  at::autocast::set_autocast_enabled(at::kCPU, on);
  if (!on) at::autocast::clear_cache();
}

// Gradient of the input or of the weight of a 3D convolution, which is dropped; false on an error.
// `padding` on every side; a transposed one has stride 2 and output padding 1.
bool peer_convolution_backward(const at::Tensor* dy, const at::Tensor* x, const at::Tensor* weight, int64_t stride,
                               int64_t padding, bool transposed, bool of_weight) {
  try {
    at::NoGradGuard no_grad;
    const int64_t output_padding = transposed ? 1 : 0;
    at::convolution_backward(*dy, *x, *weight, at::nullopt, {stride, stride, stride}, {padding, padding, padding},
                             {1, 1, 1}, transposed, {output_padding, output_padding, output_padding}, 1,
                             {!of_weight, of_weight, false});
    return true;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return false;
  }
}
}
