//! Values that flow through the network and the tape that remembers how they were made. Knows no op.

mod activation;
mod float;
mod param;
mod shape;
mod tape;
#[allow(clippy::module_inception)]
mod tensor;

pub use activation::{Activation, Pending};
pub use float::Float;
pub use param::Param;
pub use shape::Shape;
pub use tape::{Grads, ParamId, Tape};
pub use tensor::{Tensor, ValueId};
