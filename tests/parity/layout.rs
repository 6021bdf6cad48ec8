//! torch's (N, C, D, H, W) to and from the engine's (N, D, H, W, C).

use spleen_hpc::tensor::{Shape, Tensor as Engine};

use crate::Outcome;
use crate::place;
use crate::tensor::{Elem, Tensor};

/// The engine's shape of a torch tensor.
pub fn shape(torch: &Tensor) -> Outcome<Shape> {
    match torch.shape[..] {
        [n, c, d, h, w] => Ok(Shape::new(n, [d, h, w], c)),
        _ => Err(format!("shape {:?} is not (N, C, D, H, W)", torch.shape).into()),
    }
}

/// Values of a torch tensor with the channels last.
pub fn channels_last(torch: &Tensor) -> Outcome<Vec<f64>> {
    let s = shape(torch)?;
    let mut values = vec![0.0; s.len()];
    for (i, &v) in torch.data.iter().enumerate() {
        let (voxel, plane) = (i % s.voxels(), i / s.voxels());
        values[((plane / s.c) * s.voxels() + voxel) * s.c + plane % s.c] = v;
    }
    Ok(values)
}

/// The torch tensor of channels-last values.
pub fn channels_first<T: Elem>(s: Shape, values: &[T]) -> Tensor {
    let samples = values.chunks_exact(s.voxels() * s.c);
    let planes = samples.flat_map(|x| (0..s.c).flat_map(move |c| x.iter().skip(c).step_by(s.c).copied()));
    Tensor::new(&[s.n, s.c, s.d, s.h, s.w], &planes.collect::<Vec<T>>())
}

/// A torch tensor for the engine, rounded to float32, where it computes.
pub fn to_engine(torch: &Tensor) -> Outcome<Engine> {
    let values: Vec<f32> = channels_last(torch)?.into_iter().map(|v| v as f32).collect();
    place::tensor(Engine::from_slice(shape(torch)?, &values))
}

/// An engine's tensor for the ledger.
pub fn to_torch(engine: &Engine) -> Outcome<Tensor> {
    Ok(channels_first(engine.shape(), engine.to_host()?.data()))
}
