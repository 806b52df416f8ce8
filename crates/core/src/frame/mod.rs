//! Frames: RAM pages that uhmm owns, and the arena of slots in which they lie.
//!
//! What    [`Arena`], a range of addresses cut into slots; [`Run`], consecutive slots that somebody owns, in
//!         one of two states that the type tells apart: [`Empty`] (address space without a frame) and
//!         [`Framed`] (a frame in each slot).
//! Why     moving a page out puts its frame into an empty slot, moving one in takes a frame from a framed
//!         slot: frames change places, and neither allocates.
//! Owns    a run owns its slots until it is dropped (they go back to the pool) or dissolved into page words
//!         (`Run::dissolve`), which own their slot from then on (`Arena::adopt` makes a run of it again).
//! Lent    a slot's descriptor notes who has the frame for itself, if the word that owns the slot says that somebody has.
//! Counts  a slot's descriptor has count 0 in the pool and 1 with an owner (rule R3). Zero memory is a
//!         valid, free descriptor.
//! Clean   frames in the pool hold old contents. They are used for pages of the same space only, and each
//!         is overwritten whole before it is installed (rule R9); to leave the space they are released to
//!         the kernel, which clears them.
//! Locks   the pool's own gate, innermost, for a few hundred nanoseconds; never across a call of the host.
//! Fails   an arena with no slot of the wanted kind gives nothing; the caller takes fewer or waits.

mod arena;
mod bitmap;
mod run;
#[cfg(all(test, not(loom)))]
mod tests;

pub(crate) use arena::Holder;
pub use arena::{Arena, Slot};
pub use run::{Empty, Framed, Run, RunState};
