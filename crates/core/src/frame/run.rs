//! Consecutive slots with an owner.

use core::marker::PhantomData;
use core::mem;
use core::ptr::NonNull;

use uhmm_addr::{PageCount, VaRange, VirtAddr};

use super::arena::{Arena, Slot, StateMarker};
use crate::sync::Park;

/// The slots have no frames: a move may put frames there.
#[derive(Debug)]
pub enum Empty {}

/// Every slot has a frame, of undefined contents unless the owner filled it.
#[derive(Debug)]
pub enum Framed {}

/// The two states of a run; sealed.
pub trait RunState: sealed::Sealed {
    /// Whether the slots have frames.
    const FRAMED: bool;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::Empty {}
    impl Sealed for super::Framed {}
}

impl RunState for Empty {
    const FRAMED: bool = false;
}

impl RunState for Framed {
    const FRAMED: bool = true;
}

/// Consecutive slots, owned; dropped, they go back to the arena's pool.
///
/// There is one owner, and bytes only where there are frames:
///
/// ```compile_fail,E0599
/// # use uhmm_core::{frame::{Framed, Run}, sync::Park};
/// fn two<'a, P: Park>(run: &Run<'a, Framed, P>) -> Run<'a, Framed, P> {
///     (*run).clone()
/// }
/// ```
/// ```compile_fail,E0599
/// # use uhmm_core::{frame::{Empty, Run}, sync::Park};
/// fn bytes<P: Park>(run: &Run<'_, Empty, P>) -> *mut u8 {
///     run.as_ptr().as_ptr()
/// }
/// ```
#[must_use]
#[derive(Debug)]
pub struct Run<'a, S: RunState, P: Park + ?Sized> {
    arena: &'a Arena,
    park: &'a P,
    first: Slot,
    len: usize,
    state: StateMarker<S>,
}

impl<'a, S: RunState, P: Park + ?Sized> Run<'a, S, P> {
    pub(super) const fn forge(arena: &'a Arena, park: &'a P, first: Slot, len: usize) -> Self {
        Self { arena, park, first, len, state: PhantomData }
    }

    /// The first slot.
    pub const fn first(&self) -> Slot {
        self.first
    }

    /// Length in pages, at least one.
    pub const fn pages(&self) -> PageCount {
        PageCount::new(self.len)
    }

    /// Every slot, in order.
    pub fn slots(&self) -> impl Iterator<Item = Slot> + use<S, P> {
        (self.first.get()..self.first.get() + self.len as u32).map(Slot::new)
    }

    /// Where the slots lie.
    pub const fn address(&self) -> VirtAddr {
        self.arena.address(self.first)
    }

    /// The slots' addresses.
    pub fn range(&self) -> VaRange {
        VaRange::of_pages(self.address().page(), self.pages()).expect("a run is never empty")
    }

    /// Cuts the run behind its first `pages` pages. A part that would be empty is `None`.
    pub fn split(self, pages: PageCount) -> (Option<Self>, Option<Self>) {
        let head = pages.get().min(self.len);
        let (arena, park, first, len) = (self.arena, self.park, self.first, self.len);
        mem::forget(self);
        let part = |at: usize, len: usize| {
            (len > 0).then(|| Self::forge(arena, park, Slot::new(first.get() + at as u32), len))
        };
        (part(0, head), part(head, len - head))
    }

    /// Lets go of the slots without giving them back: page words own them now.
    pub(crate) fn dissolve(self) {
        mem::forget(self);
    }

    fn become_state<T: RunState>(self) -> Run<'a, T, P> {
        let (arena, park, first, len) = (self.arena, self.park, self.first, self.len);
        mem::forget(self);
        Run::forge(arena, park, first, len)
    }
}

impl<'a, P: Park + ?Sized> Run<'a, Empty, P> {
    /// The caller has moved a frame into every slot.
    pub(crate) fn filled(self) -> Run<'a, Framed, P> {
        self.become_state()
    }
}

impl<'a, P: Park + ?Sized> Run<'a, Framed, P> {
    /// The caller has moved the frame out of every slot.
    pub(crate) fn emptied(self) -> Run<'a, Empty, P> {
        self.become_state()
    }

    /// Where the frames' bytes lie, for a device to read or fill.
    pub fn as_ptr(&self) -> NonNull<u8> {
        NonNull::new(self.address().get() as *mut u8).expect("an arena does not lie at address zero")
    }
}

impl<S: RunState, P: Park + ?Sized> Drop for Run<'_, S, P> {
    fn drop(&mut self) {
        self.arena.put(self.park, self.first, self.len, S::FRAMED);
    }
}
