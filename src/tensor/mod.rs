//! Values that flow through the network and the tape that remembers how they were made. Knows no op.

mod activation;
mod device_param;
mod float;
mod param;
mod shape;
mod tape;
#[allow(clippy::module_inception)]
mod tensor;
mod view;

pub use activation::{Activation, Pending};
pub use device_param::DeviceParam;
pub use float::Float;
pub use param::Param;
pub use shape::Shape;
pub use tape::{Grads, ParamId, Tape, add_assign};
pub use tensor::{Tensor, ValueId, Values, ValuesMut};
pub use view::{DevicePending, Partials, PendingArgs, View};
