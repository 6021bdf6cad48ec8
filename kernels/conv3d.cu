// 3D convolution of stride 1 by one group of 16 output channels a warp.
#include "conv3d.cuh"

CONV3D(conv3d_k3s1_d8g1, 256, 3, 1, 8, 1)
CONV3D(conv3d_k3s1_d6g1, 384, 3, 1, 6, 1)
CONV3D(conv3d_k1s1_d6g1, 384, 1, 1, 6, 1)
