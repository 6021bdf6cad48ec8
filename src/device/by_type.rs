//! What nobody uses, by type: for whoever needs another of a type.

use std::any::TypeId;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};

/// Pointers `P` to values that nobody uses, each under its value's type.
pub struct ByType<P>(Mutex<Option<HashMap<TypeId, Vec<P>>>>);

impl<P> ByType<P> {
    /// Nothing yet.
    pub const fn new() -> Self {
        ByType(Mutex::new(None))
    }

    /// The one that was left last.
    pub fn take<T: 'static>(&self) -> Option<P> {
        self.lock().get_or_insert_default().get_mut(&TypeId::of::<T>()).and_then(Vec::pop)
    }

    /// Leaves one of a `T`.
    pub fn leave<T: 'static>(&self, left: P) {
        self.lock().get_or_insert_default().entry(TypeId::of::<T>()).or_default().push(left);
    }

    /// Gives all back to the system.
    pub fn trim(&self) {
        // Dropped without the lock.
        let left = self.lock().take();
        drop(left);
    }

    fn lock(&self) -> MutexGuard<'_, Option<HashMap<TypeId, Vec<P>>>> {
        // A panicking holder leaves only whole operations behind, so a poisoned map is still a good one.
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}
