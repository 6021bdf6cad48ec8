//! Values that are shared, and whose counters leave their memory to others to come.

use super::by_type::ByType;
use std::any::Any;
use std::ops::Deref;
use std::sync::Arc;

static FREE: ByType<Arc<dyn Any + Send + Sync>> = ByType::new();

/// An `Arc` in memory that is used again.
#[derive(Debug)]
pub struct Shared<T: Send + Sync + 'static>(Option<Arc<Option<T>>>);

impl<T: Send + Sync + 'static> Shared<T> {
    /// Shares `value` among this and its clones.
    pub fn new(value: T) -> Self {
        let mut left = FREE.take::<T>().and_then(|left| left.downcast().ok()).unwrap_or_default();
        *Arc::get_mut(&mut left).expect("nobody else has what nobody uses") = Some(value);
        Shared(Some(left))
    }

    /// The value for writing, if nobody else has it.
    pub fn get_mut(&mut self) -> Option<&mut T> {
        self.0.as_mut().and_then(Arc::get_mut).and_then(Option::as_mut)
    }
}

impl<T: Send + Sync + 'static> Clone for Shared<T> {
    fn clone(&self) -> Self {
        Shared(self.0.clone())
    }
}

impl<T: Send + Sync + 'static> Deref for Shared<T> {
    type Target = T;
    fn deref(&self) -> &T {
        self.0.as_deref().and_then(Option::as_ref).expect("it is there until it is dropped")
    }
}

impl<T: Send + Sync + 'static> Drop for Shared<T> {
    fn drop(&mut self) {
        let Some(mut left) = self.0.take() else { return };
        // Of two that are dropped at once neither may be the last here: then the memory goes with the value.
        if Arc::get_mut(&mut left).and_then(Option::take).is_some() {
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
    #[derive(Debug, PartialEq)]
    struct Number(Arc<u8>);

    #[test]
    fn a_value_is_dropped_with_its_last_owner_and_leaves_its_place() {
        let seven = Arc::new(7);
        let mut first = Shared::new(Number(seven.clone()));
        let place = first.get_mut().map(std::ptr::from_mut).expect("one owner");
        let second = first.clone();
        assert!(first.get_mut().is_none(), "two owners");
        assert_eq!((&*first, &*second), (&Number(seven.clone()), &Number(seven.clone())));
        drop(first);
        assert_eq!((Arc::strong_count(&seven), &*second), (2, &Number(seven.clone())));
        drop(second);
        assert_eq!(Arc::strong_count(&seven), 1);
        let mut third = Shared::new(Number(Arc::new(8)));
        assert_eq!(third.get_mut().map(std::ptr::from_mut), Some(place));
    }
}
