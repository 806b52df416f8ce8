//! What an address space is to be, and putting it together.
//!
//! Owns    the order in which userfaultfd is opened, memory is reserved and registered, and core's parts are made; what
//!         was made before a step that fails is dropped again.
//! Fails   with a [`BuildError`].

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize};

use uhmm_addr::{ByteSize, Geometry, Vpn};
use uhmm_core::fault::window::Windows;
use uhmm_core::frame::Arena;
use uhmm_core::mm::{Mm, Parts};
use uhmm_core::pagemap::{Pagemap, PagemapSet};
use uhmm_core::pagetable::PageTable;
use uhmm_core::stats::Stats;
use uhmm_core::sync::Gate;
use uhmm_sys::futex::Lock;
use uhmm_sys::host::{Chute, HostOptions, LinuxHost};
use uhmm_sys::mapping::Mapping;
use uhmm_sys::uffd::{Features, Mode, OpenError, RegisterError, Uffd};

use super::ranges::{PUBLISHED, Ranges};
use super::threads::OURS;
use super::{Managed, TABLE_BYTES, USER_PAGES};

/// How faults reach us.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reports {
    /// As messages that handler threads read, with the events of a program that changes its own mappings.
    Messages,
    /// As SIGBUS in the thread that touched.
    Sigbus,
}

/// What a [`Managed`] is to be.
#[derive(Debug)]
pub struct Plan {
    /// How faults are reported.
    pub reports: Reports,
    /// Memory for the page table, [`TABLE_BYTES`] long and zero where unused; `None` for private memory.
    pub table: Option<Mapping>,
    /// Addresses for 4 KiB frames. Frames count as used memory only while they are there.
    pub arena: ByteSize,
    /// Addresses for 2 MiB frames; `None` if huge pages need not stay huge.
    pub huge: Option<ByteSize>,
    /// The devices.
    pub pagemaps: Vec<Arc<Pagemap>>,
    /// Pages that a fault brings home.
    pub windows: Windows,
    /// Keep the device copy of pages that are only read.
    pub track: bool,
    /// Behave as a kernel without `UFFDIO_MOVE`.
    pub forced_fallback: bool,
    /// Where to count.
    pub stats: Option<&'static Stats>,
}

/// Why an address space cannot be managed.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// No userfaultfd for this user; the message says what would grant it.
    #[error(transparent)]
    Uffd(#[from] OpenError),
    /// The kernel lacks a feature without which contents could be lost.
    #[error(
        "the kernel's userfaultfd lacks {0}; Linux 5.7 or later and the right to trace processes are needed"
    )]
    Feature(&'static str),
    /// No address space for the tables: a limit such as `ulimit -v` is too low.
    #[error("cannot reserve {size} of address space for {what}; is there a limit (ulimit -v)?")]
    AddressSpace {
        /// How much.
        size: ByteSize,
        /// What for.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// Pages of a coherent device are mapped in place by moving their frames.
    #[error(
        "{0} is coherent: its pages are mapped in place, for which the kernel must be able to move frames \
         (UFFDIO_MOVE, Linux 6.8 or later)"
    )]
    Coherent(String),
    /// A coherent device's memory could not be registered: another space has the device.
    #[error("the memory of {device} cannot be watched; a coherent device can be in one space at a time")]
    DeviceMemory {
        /// The device.
        device: String,
        /// What the kernel said.
        source: RegisterError,
    },
    /// A mapping of our own could not be registered.
    #[error("cannot register uhmm's own arena")]
    Register(#[from] RegisterError),
    /// Something else of this process could not be opened.
    #[error("cannot open what tells about this process's memory")]
    Process(#[from] io::Error),
}

fn reserve(size: usize, align: usize, what: &'static str) -> Result<Mapping, BuildError> {
    Mapping::reserve_aligned(size, align, what).map_err(|source| BuildError::AddressSpace {
        size: ByteSize::new(size as u64),
        what,
        source,
    })
}

/// The features without which the way of reporting does not work.
const fn needed(reports: Reports) -> Features {
    match reports {
        Reports::Messages => Features::WP
            .union(Features::EVENT_REMAP)
            .union(Features::EVENT_REMOVE)
            .union(Features::EVENT_UNMAP)
            .union(Features::THREAD_ID),
        Reports::Sigbus => Features::SIGBUS,
    }
}

impl Managed {
    /// Opens userfaultfd and builds what `plan` says.
    pub fn build(plan: Plan) -> Result<Self, BuildError> {
        let useful = Features::MOVE.union(Features::POISON).union(Features::WP).union(match plan.reports {
            Reports::Messages => Features::EVENT_FORK,
            Reports::Sigbus => Features::NONE,
        });
        let uffd = Uffd::open(needed(plan.reports).union(useful))?;
        Self::on(uffd, plan)
    }

    /// Builds what `plan` says on a descriptor that exists, as a child does after fork.
    pub fn on(uffd: Uffd, plan: Plan) -> Result<Self, BuildError> {
        let missing = needed(plan.reports).without(uffd.features());
        if let Some((name, _)) = Features::NAMED.iter().find(|(_, bit)| missing.contains(*bit)) {
            return Err(BuildError::Feature(name));
        }
        // Before any mapping of ours is registered, whose end would be an event that nobody reads.
        for map in &plan.pagemaps {
            let Some(memory) = map.memory() else { continue };
            let device = || map.device().name().to_owned();
            if plan.forced_fallback || !uffd.features().contains(Features::MOVE) {
                return Err(BuildError::Coherent(device()));
            }
            // SAFETY: the device's memory, of which an absent page is touched by nobody before it has a frame.
            unsafe { uffd.register(memory, Mode::MISSING) }
                .map_err(|source| BuildError::DeviceMemory { device: device(), source })?;
        }
        let chute = match plan.reports {
            Reports::Messages => Some(Chute::new()?),
            Reports::Sigbus => None,
        };
        let mut memory = Vec::new();
        let (words, fresh) = match plan.table {
            Some(words) => (words, false),
            None => (reserve(TABLE_BYTES, 4096, "uhmm-table")?, true),
        };
        words.advise_no_huge()?;
        // SAFETY: the mapping has room for the bits behind the words.
        let used = unsafe { words.as_ptr().cast::<u64>().add(USER_PAGES.get()) };
        let over = if fresh { PageTable::over_zeros } else { PageTable::over };
        // SAFETY: the mapping is as long as the table needs and zero where unused, all of it if it was just reserved; it
        // is kept in `memory`, which outlives the table, and nobody else uses it.
        let table = unsafe { over(words.as_ptr().cast(), used, Vpn::new(0), USER_PAGES) };
        let arena = reserve(plan.arena.pages().bytes(), Geometry::M2.bytes(), "uhmm-arena")?;
        arena.advise_no_huge()?;
        let huge = match plan.huge {
            Some(size) => Some(reserve(size.pages().bytes(), Geometry::M2.bytes(), "uhmm-huge")?),
            None => None,
        };
        for mapping in [Some(&arena), huge.as_ref()].into_iter().flatten() {
            mapping.dont_fork()?;
            // SAFETY: the arenas are ours, and empty slots are never touched, so that nobody waits for a
            // handler.
            unsafe { uffd.register(mapping.range(), Mode::MISSING) }?;
        }
        if let Some(huge) = &huge {
            huge.advise_huge()?;
        }
        let options = HostOptions { forced_fallback: plan.forced_fallback, forced_pagemap: false };
        let mm = Mm::new(Parts {
            host: LinuxHost::new(uffd, chute, options)?,
            table,
            pagemaps: PagemapSet::new(plan.pagemaps),
            arena: Arena::new(arena.range(), Geometry::K4),
            huge: huge.as_ref().map(|huge| Arena::new(huge.range(), Geometry::M2)),
            windows: plan.windows,
            track: plan.track && plan.reports == Reports::Messages,
            stats: plan.stats,
        });
        memory.extend([words, arena]);
        memory.extend(huge);
        Ok(Self {
            mm,
            ranges: Lock::new(Ranges::default()),
            room: AtomicU32::new(0),
            kick: AtomicU32::new(0),
            ours: [const { AtomicU32::new(0) }; OURS],
            published: Box::new([const { [const { AtomicUsize::new(0) }; 2] }; PUBLISHED]),
            low: AtomicUsize::new(0),
            busy: AtomicU32::new(0),
            changing: Gate::new(),
            keeper: AtomicU32::new(0),
            replacing: Lock::new(None),
            memory,
        })
    }
}
