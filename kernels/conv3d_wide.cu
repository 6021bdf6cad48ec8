// 3D convolution of stride 1 by two groups of 16 output channels a warp.
#include "conv3d.cuh"

CONV3D(conv3d_k3s1_d6g2, 256, 3, 1, 6, 2)
CONV3D(conv3d_k3s1_d4g2, 256, 3, 1, 4, 2)
