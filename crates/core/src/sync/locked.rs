//! A value behind a lock of the house.
//!
//! What    [`Locked`], a value that is reached through a [`Gate`] held for writing only; [`Held`], the proof.
//! Why     a driver's table is changed by whoever changes pages, a fault handler included, and is read and written
//!         by the driver; the holders of pins come and go in any thread: one at a time.
//! Locks   this is one. A guard stays with its thread, which is known not to touch managed memory meanwhile.
//! Fails   nothing here fails; [`Locked::try_lock`] says that somebody else is inside.

use core::cell::UnsafeCell;
use core::fmt;
use core::marker::PhantomData;
use core::ops::{Deref, DerefMut};

use super::{Gate, Park, WriteGuard};

/// The value and its lock.
pub(crate) struct Locked<T> {
    gate: Gate,
    value: UnsafeCell<T>,
}

// SAFETY: the value is reached through `Held` only, which one thread at a time has.
unsafe impl<T: Send> Sync for Locked<T> {}

/// The right to the value until dropped.
pub(crate) struct Held<'a, T> {
    locked: &'a Locked<T>,
    _alone: WriteGuard<'a, dyn Park + 'a>,
    _stays: PhantomData<*const ()>,
}

impl<T> fmt::Debug for Locked<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Locked").field("gate", &self.gate).finish_non_exhaustive()
    }
}

impl<T> Locked<T> {
    pub(crate) fn new(value: T) -> Self {
        Self { gate: Gate::new(), value: UnsafeCell::new(value) }
    }

    /// Waits until nobody else is inside.
    pub(crate) fn lock<'a>(&'a self, park: &'a (dyn Park + 'a)) -> Held<'a, T> {
        Held { locked: self, _alone: self.gate.write(park), _stays: PhantomData }
    }

    /// `None` if somebody else is inside.
    pub(crate) fn try_lock<'a>(&'a self, park: &'a (dyn Park + 'a)) -> Option<Held<'a, T>> {
        self.gate.try_write(park).map(|alone| Held { locked: self, _alone: alone, _stays: PhantomData })
    }

    pub(crate) fn get_mut(&mut self) -> &mut T {
        self.value.get_mut()
    }

    pub(crate) fn into_inner(self) -> T {
        self.value.into_inner()
    }
}

impl<T> Deref for Held<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the gate is held for writing as long as `self` lives: nobody else has a reference.
        unsafe { &*self.locked.value.get() }
    }
}

impl<T> DerefMut for Held<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as above, and `self` is borrowed exclusively.
        unsafe { &mut *self.locked.value.get() }
    }
}
