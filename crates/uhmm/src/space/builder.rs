//! What a [`Space`] is built from.
//!
//! What    [`Builder`], the choices; [`Builder::build`] numbers the pages of the devices, reserves the memory and
//!         starts the threads.
//! Why     a space is whole or not there: nobody meets one without its handlers.
//! Owns    nothing: what it makes is the space's.
//! Fails   with a [`SpaceError`]. A budget that cannot be kept is refused before anything is opened.

use std::io;
use std::sync::Arc;

use uhmm_addr::{ByteSize, PageCount, Pfn};
use uhmm_core::device::Device;
use uhmm_core::fault::window::Windows;
use uhmm_core::notifier::Owner;
use uhmm_core::pagemap::{MOST_ADDED, Pagemap};
use uhmm_sys::futex::Lock;

use super::{Inner, Nodes, Space};
use crate::engine::Engine;
use crate::engine::signal::{self, EnlistError};
use crate::managed::{BuildError, Managed, Plan, Reports};

/// Why a space could not be built.
#[derive(Debug, thiserror::Error)]
pub enum SpaceError {
    /// Userfaultfd or address space is missing; the message says what would help.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The signal handler could not be installed.
    #[error(transparent)]
    Signal(#[from] EnlistError),
    /// A thread could not be started, or a file of this process not opened.
    #[error("the space's threads cannot be started")]
    Threads(#[from] io::Error),
    /// A budget needs a device to evict to.
    #[error("a limit of {0} needs a device to which pages can be moved; add one with `device`")]
    NoDevice(ByteSize),
    /// The budget is too small to work with.
    #[error("a limit of {given} is too small; at least {least} are needed")]
    Budget {
        /// What was asked for.
        given: ByteSize,
        /// The least that works.
        least: ByteSize,
    },
}

/// What to build a [`Space`] from.
#[must_use]
#[derive(Clone)]
pub struct Builder {
    ram: Option<ByteSize>,
    engine: Engine,
    devices: Vec<(Arc<dyn Device>, Option<Owner>)>,
    huge: bool,
    forced_fallback: bool,
    window: PageCount,
    fault_around: bool,
    clean_copies: bool,
    arena: ByteSize,
}

/// The least budget that a space works with.
pub const LEAST_BUDGET: ByteSize = ByteSize::mib(1);

impl Builder {
    /// Keeps resident memory at `limit` at most, evicting cold pages to the first device in the background.
    pub fn ram(mut self, limit: ByteSize) -> Self {
        self.ram = Some(limit);
        self
    }

    /// How faults are served.
    pub fn engine(mut self, engine: Engine) -> Self {
        self.engine = engine;
        self
    }

    /// Adds a device; the first is number 0. A coherent one is in one space at a time, and needs a kernel that moves
    /// frames (Linux 6.8); its pages are mapped in place.
    pub fn device(mut self, device: Arc<dyn Device>) -> Self {
        self.devices.push((device, None));
        self
    }

    /// Adds a device whose pages are `owner`'s: devices of one owner, as behind one coherent link, have their pages
    /// in common. Without this, a device has an owner to itself.
    pub fn device_of(mut self, owner: Owner, device: Arc<dyn Device>) -> Self {
        self.devices.push((device, Some(owner)));
        self
    }

    /// Moves huge pages (2 MiB) whole, out and back. Off by default: a touch then brings 2 MiB.
    pub fn huge_pages(mut self, keep: bool) -> Self {
        self.huge = keep;
        self
    }

    /// Pages that a touch at random brings home; sequences grow from there. 1 by default.
    pub fn window(mut self, pages: PageCount) -> Self {
        self.window = pages;
        self
    }

    /// Whether a fault may bring neighbours of the page that was touched, from a device or as fresh memory. On by
    /// default; without it a touch changes one page and no other, whatever the window.
    pub fn fault_around(mut self, neighbours: bool) -> Self {
        self.fault_around = neighbours;
        self
    }

    /// Whether a page that came home and was only read keeps its copy on the device, to leave again without being
    /// written. On by default, with the engine that can; the first write to such a page faults.
    pub fn clean_copies(mut self, keep: bool) -> Self {
        self.clean_copies = keep;
        self
    }

    /// Addresses for frames on their way; 256 MiB by default.
    pub fn arena(mut self, size: ByteSize) -> Self {
        self.arena = size;
        self
    }

    /// Behaves as on a kernel without `UFFDIO_MOVE`: pages are copied out behind a write protection.
    pub fn forced_fallback(mut self, forced: bool) -> Self {
        self.forced_fallback = forced;
        self
    }

    /// Builds the space and starts its threads.
    pub fn build(self) -> Result<Space, SpaceError> {
        if let Some(given) = self.ram {
            if self.devices.is_empty() {
                return Err(SpaceError::NoDevice(given));
            }
            if given < LEAST_BUDGET {
                return Err(SpaceError::Budget { given, least: LEAST_BUDGET });
            }
        }
        let mut start = Pfn::new(1 << 20);
        let mut pagemaps = Vec::new();
        for (device, owner) in self.devices {
            let map = Pagemap::new(start, device);
            let map = if let Some(owner) = owner { map.owned_by(owner) } else { map };
            start = Pfn::new(map.range().end().get().next_multiple_of(uhmm_addr::CHUNK_PAGES as u64));
            pagemaps.push(Arc::new(map));
        }
        let reports = match self.engine {
            Engine::Signal => Reports::Sigbus,
            Engine::Threads => Reports::Messages,
        };
        let windows = if self.fault_around {
            Windows::new(self.window, uhmm_core::fault::MAX_WINDOW)
        } else {
            Windows::one_by_one()
        };
        let managed = Arc::new(Managed::build(Plan {
            reports,
            table: None,
            arena: self.arena,
            huge: self.huge.then_some(self.arena),
            pagemaps: pagemaps.clone(),
            windows,
            track: self.clean_copies,
            forced_fallback: self.forced_fallback,
            stats: None,
        })?);
        let stops = (0..pagemaps.len() + MOST_ADDED).map(|_| Lock::new(0)).collect();
        let nodes = Arc::new(Nodes::new(start));
        let limited = self.ram.is_some();
        let mut inner =
            Inner { managed, nodes, limited, stops, membership: None, crew: None, threads: Vec::new() };
        match self.engine {
            Engine::Signal => inner.membership = Some(signal::enlist(inner.managed.clone())?),
            Engine::Threads => inner.start_handlers()?,
        }
        if let Some(limit) = self.ram {
            inner.start_evictor(limit)?;
        }
        Ok(Space { inner: Arc::new(inner) })
    }
}

impl Space {
    /// A space with the signal engine, no limit and no device, to be changed from there.
    pub fn builder() -> Builder {
        Builder {
            ram: None,
            engine: Engine::default(),
            devices: Vec::new(),
            huge: false,
            forced_fallback: false,
            window: PageCount::ONE,
            fault_around: true,
            clean_copies: true,
            arena: ByteSize::mib(256),
        }
    }
}
