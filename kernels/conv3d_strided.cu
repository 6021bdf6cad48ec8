// 3D convolution of stride 2.
#include "conv3d.cuh"

CONV3D(conv3d_k3s2_d3g1, 256, 3, 2, 3, 1)
CONV3D(conv3d_k3s2_d3g2, 384, 3, 2, 3, 2)
