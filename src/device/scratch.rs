//! Scratch that tasks leave to tasks to come: none allocates what another has.

use super::by_type::ByType;
use std::any::Any;
use std::ops::{Deref, DerefMut};

static FREE: ByType<Box<dyn Any + Send>> = ByType::new();

/// A `T` as the last task left it, or a default one.
pub struct Scratch<T: Default + Send + 'static>(Option<Box<T>>);

impl<T: Default + Send + 'static> Scratch<T> {
    /// Has it until it is dropped.
    pub fn take() -> Self {
        let left = FREE.take::<T>().and_then(|left| left.downcast().ok());
        Scratch(left.or_else(|| Some(Box::default())))
    }
}

impl<T: Default + Send + 'static> Deref for Scratch<T> {
    type Target = T;
    fn deref(&self) -> &T {
        self.0.as_deref().expect("it is there until it is dropped")
    }
}

impl<T: Default + Send + 'static> DerefMut for Scratch<T> {
    fn deref_mut(&mut self) -> &mut T {
        self.0.as_deref_mut().expect("it is there until it is dropped")
    }
}

impl<T: Default + Send + 'static> Drop for Scratch<T> {
    fn drop(&mut self) {
        if let Some(left) = self.0.take() {
            FREE.leave::<T>(left);
        }
    }
}

/// Gives what nobody uses back to the system.
pub(super) fn trim() {
    FREE.trim();
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nobody else's.
    #[derive(Debug, Default, PartialEq)]
    struct Number(u8);

    #[test]
    fn a_task_has_what_the_last_one_left() {
        let mut first = Scratch::<Number>::take();
        *first = Number(7);
        assert_eq!(*Scratch::<Number>::take(), Number(0), "nobody else has it");
        drop(first);
        let both = [Scratch::<Number>::take(), Scratch::take()];
        assert!(both.iter().any(|number| **number == Number(7)));
    }
}
