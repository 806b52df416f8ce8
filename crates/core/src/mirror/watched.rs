//! A table that is told of changes, and is reached past the check only.
//!
//! What    [`Watched`], the table with its subscription; [`Collection`], from when on somebody collects; [`Checked`],
//!         the right to change the table, which is had only where nothing changed since.
//! Why     the check of the sequence, under the lock that invalidation takes, is what makes R5 hold. It must not be
//!         possible to forget it.
//! Owns    the table, together with the notifiers, which let go of it when the subscription is dropped.
//! Locks   the table's, taken inside the notifiers' by whoever changes pages, and by itself by the driver.
//! Races   as in [`notifier`](crate::notifier): a change marks its number under the lock. Who holds the lock after it
//!         finds the number; who held it before has his update invalidated.
//! Fails   nothing here fails. Dropped, it waits until no callback runs.

use alloc::sync::Arc;
use core::fmt;
use core::ops::{Deref, DerefMut};

use uhmm_addr::VaRange;

use super::MirrorTable;
use super::gone::Gone;
use super::known::Known;
use super::view::Segment;
use crate::frame::Holder;
use crate::notifier::{Change, Event, Mark, Notifiers, Subscriber, Subscription, Ticket, WouldBlock};
use crate::sync::Park;
use crate::sync::locked::{Held, Locked};

struct Inside<T> {
    table: T,
    gone: Gone,
}

struct Shared<T> {
    range: VaRange,
    /// Changed under the lock of what is inside.
    known: Known,
    inside: Locked<Inside<T>>,
}

impl<T: MirrorTable> Subscriber for Shared<T> {
    fn invalidate(&self, change: &Change, mark: Mark<'_>) -> Result<(), WouldBlock> {
        let Some(range) = self.range.intersect(change.range) else { return Ok(()) };
        let mut inside = if change.may_block {
            self.inside.lock(mark.park())
        } else {
            self.inside.try_lock(mark.park()).ok_or(WouldBlock)?
        };
        mark.set();
        self.known.forget(range);
        if change.event == Event::Unmap {
            inside.gone.add(range);
        }
        inside.table.invalidate(range, change.event);
        Ok(())
    }
}

/// A table and its subscription.
pub(super) struct Watched<'n, P: Park, T> {
    // Dropped first: no callback runs when the table goes.
    subscription: Subscription<'n, P>,
    shared: Arc<Shared<T>>,
    park: &'n P,
}

impl<'n, P: Park, T: MirrorTable> Watched<'n, P, T> {
    /// If not `remember`, nothing is kept that was found of the pages: nobody is told of all their changes.
    pub(super) fn new(
        notifiers: &'n Notifiers,
        park: &'n P,
        range: VaRange,
        table: T,
        remember: bool,
    ) -> Self {
        let inside = Locked::new(Inside { table, gone: Gone::NOTHING });
        let shared = Arc::new(Shared { range, known: Known::new(range, remember), inside });
        Self { subscription: notifiers.subscribe(park, range, shared.clone()), shared, park }
    }
}

impl<'n, P: Park, T> Watched<'n, P, T> {
    pub(super) const fn range(&self) -> VaRange {
        self.subscription.range()
    }

    /// Who has what is lent to this one.
    pub(super) const fn holder(&self) -> Holder {
        Holder(self.subscription.number())
    }

    /// Waits until no change of the pages is under way, and begins to collect.
    pub(super) fn collect(&self) -> Collection<'_, T> {
        self.collection(self.subscription.read_begin())
    }

    /// Begins to collect if no change of the pages is under way.
    pub(super) fn try_collect(&self) -> Option<Collection<'_, T>> {
        self.subscription.try_read_begin().map(|ticket| self.collection(ticket))
    }

    fn collection<'a>(&'a self, ticket: Ticket<'a>) -> Collection<'a, T> {
        let gone = self.gone();
        Collection { ticket, shared: &self.shared, park: self.park, gone }
    }

    /// Which chunks are known to be in RAM.
    pub(super) fn known(&self) -> &Known {
        &self.shared.known
    }

    pub(super) fn gone(&self) -> Gone {
        self.shared.inside.lock(self.park).gone
    }

    pub(super) fn look<R>(&self, look: impl FnOnce(&T) -> R) -> R {
        look(&self.shared.inside.lock(self.park).table)
    }

    pub(super) fn into_table(self) -> T {
        let Self { subscription, shared, .. } = self;
        drop(subscription);
        let shared = Arc::into_inner(shared).expect("the notifiers have let go of it");
        shared.inside.into_inner().table
    }
}

/// Somebody collects what he wants to install; see [`Mirror::collect`](super::Mirror::collect).
#[must_use = "what is collected is installed under its lock"]
pub struct Collection<'a, T> {
    ticket: Ticket<'a>,
    shared: &'a Shared<T>,
    park: &'a dyn Park,
    gone: Gone,
}

impl<T> fmt::Debug for Collection<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Collection").field("ticket", &self.ticket).finish_non_exhaustive()
    }
}

impl<'a, T> Collection<'a, T> {
    /// Takes the table's lock. `None` if pages changed since: what was collected is to be thrown away.
    pub fn lock(self) -> Option<Checked<'a, T>> {
        let inside = self.shared.inside.lock(self.park);
        (!self.ticket.is_stale()).then_some(Checked { inside, known: &self.shared.known })
    }

    /// Whether pages are known to have changed, so that it is useless to go on. `false` says nothing.
    pub fn is_stale(&self) -> bool {
        self.ticket.is_stale()
    }

    pub(super) const fn gone(&self) -> &Gone {
        &self.gone
    }
}

/// The right to change the table: nothing changed since the collection began, and nothing does until this is dropped.
///
/// It stays with its thread:
///
/// ```compile_fail,E0277
/// # use uhmm_core::mirror::Checked;
/// fn is_send<S: Send>() {}
/// is_send::<Checked<'static, u32>>();
/// ```
/// ```
/// # use uhmm_core::mirror::Mirror;
/// # use uhmm_core::{host::Host, mirror::MirrorTable};
/// fn is_send<S: Send>() {}
/// fn a_mirror_is<H: Host + 'static, T: MirrorTable>() { is_send::<Mirror<'static, H, T>>() }
/// ```
pub struct Checked<'a, T> {
    inside: Held<'a, Inside<T>>,
    known: &'a Known,
}

impl<T> Checked<'_, T> {
    /// Remembers what was seen since the collection began.
    pub(super) fn remember(&mut self, seen: &[Segment]) {
        seen.iter().for_each(|segment| self.known.note(segment));
    }
}

impl<T> fmt::Debug for Checked<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checked").finish_non_exhaustive()
    }
}

impl<T> Deref for Checked<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.inside.table
    }
}

impl<T> DerefMut for Checked<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.inside.table
    }
}
