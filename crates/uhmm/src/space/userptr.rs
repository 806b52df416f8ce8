//! A user's buffer for one job of a device (amdgpu's userptr): collected, used, and asked about at the end.
//!
//! What    [`Space::userptr`] makes a [`Userptr`] of managed memory; [`Userptr::get_pages`] brings its pages and says
//!         what they are; [`UserPages::done`] says whether that was true all the while, and keeps it true until the
//!         job is handed on.
//! Why     a [`Mirror`] is for a device that has a table. A job needs pages once.
//! Owns    what is known of the pages; the space is borrowed.
//! Locks   as a mirror's: whoever holds a [`Valid`] touches no managed memory and calls nothing of the space.
//! Fails   where there is no such memory; with a [`RangeFaultError`]; and with [`Changed`], after which pages are asked
//!         for again.
//!
//! ```
//! # use std::sync::Arc;
//! # use uhmm::{ByteSize, MemDevice, Space};
//! use uhmm::mirror::Want;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # if uhmm::Space::builder().build().is_err() { return Ok(()) } // no userfaultfd for this user
//! let vram = Arc::new(MemDevice::private(ByteSize::mib(4))?);
//! let space = Space::builder().device(vram).build()?;
//! let numbers = space.map::<u64>(4096)?;
//! let mut buffer = space.userptr(numbers.range())?;
//! loop {
//!     let pages = buffer.get_pages(Want::Write)?;
//!     // ... the job is built with pages.pages() ...
//!     let Ok(_valid) = pages.done() else { continue };
//!     // ... and submitted: until here nothing has changed ...
//!     break;
//! }
//! # Ok(())
//! # }
//! ```

use std::fmt;

use uhmm_addr::VaRange;
use uhmm_core::mirror as core;
use uhmm_core::notifier::Event;
use uhmm_sys::signals::Blocked;

pub use uhmm_core::mirror::Changed;

use super::Space;
use super::mirror::{Mirror, MirrorError, MirrorTable, Pages, RangeFaultError, Segment, Want};

/// Nothing is kept that would have to be taken back.
struct NoTable;

impl MirrorTable for NoTable {
    fn invalidate(&mut self, _range: VaRange, _event: Event) {}
}

/// Memory of a user that a device is to use for a job, again and again perhaps.
#[must_use = "nothing is known of its pages before they are asked for"]
pub struct Userptr<'s> {
    mirror: Mirror<'s, NoTable>,
    segments: Vec<Segment>,
}

impl fmt::Debug for Userptr<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Userptr").field("range", &self.range()).finish_non_exhaustive()
    }
}

/// What the pages were when they were asked for.
#[must_use = "what is known of the pages is worth nothing unless it is still true at the end"]
pub struct UserPages<'a>(core::UserPages<'a, NoTable>);

impl fmt::Debug for UserPages<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Proof that the pages are what they were, as long as it lives: whoever would change them waits. It stays with its
/// thread, whose signals are blocked meanwhile.
#[must_use = "dropped at once, the pages may change at once"]
pub struct Valid<'a> {
    // Dropped first: a signal handler that touches a page would wait for its own thread.
    _checked: core::Checked<'a, NoTable>,
    _blocked: Blocked,
}

impl fmt::Debug for Valid<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Valid").finish_non_exhaustive()
    }
}

impl Space {
    /// Managed memory that a device is to use for jobs.
    ///
    /// # Errors
    /// [`MirrorError::Unmanaged`], or no memory.
    pub fn userptr(&self, range: VaRange) -> Result<Userptr<'_>, MirrorError> {
        Ok(Userptr { mirror: self.mirror(range, NoTable)?, segments: Vec::new() })
    }
}

impl Userptr<'_> {
    /// The memory.
    pub const fn range(&self) -> VaRange {
        self.mirror.range()
    }

    /// Brings the pages into RAM as `want` says ([`Want::Nothing`] only looks), and tells what they are. Waits for
    /// devices and for room, like a touch of the pages.
    ///
    /// # Errors
    /// See [`RangeFaultError`]; [`RangeFaultError::TimedOut`] if the pages did not come to rest within a second, as
    /// where there are more of them than may be in RAM.
    pub fn get_pages(&mut self, want: Want) -> Result<UserPages<'_>, RangeFaultError> {
        let Self { mirror, segments } = self;
        let range = mirror.range();
        mirror
            .work(|mirror, room, scratch, patience| {
                mirror.user_pages(range, &want.into(), room, segments, scratch, patience)
            })
            .map(UserPages)
    }
}

impl<'a> UserPages<'a> {
    /// The pages, as they were.
    pub const fn pages(&self) -> Pages<'a> {
        self.0.pages()
    }

    /// Whether they are known to have changed, so that it is useless to go on. `false` says nothing.
    pub fn is_stale(&self) -> bool {
        self.0.is_stale()
    }

    /// Keeps the pages as they are until the result is dropped, if they are still what they were
    /// (`amdgpu_ttm_tt_get_user_pages_done`). For handing the job to the device, and no more.
    ///
    /// # Errors
    /// They are not, and the job is worth nothing: [`Userptr::get_pages`] again.
    pub fn done(self) -> Result<Valid<'a>, Changed> {
        let blocked = Blocked::all();
        Ok(Valid { _checked: self.0.done()?, _blocked: blocked })
    }
}
