//! What the keeper owns, before it is one.
//!
//! What     [`Tree`]: device, descriptors, statistics, the agent's library, a buffer and the socket.
//! Why      it is made in the front process: what fails does so before the program starts, and somebody reads
//!          why.
//! Owns     all of that. The pagemap points into a mapping of the same structure, which is dropped after it.
//! Locks    none. Agents map the descriptors and the statistics too, and change them by atomics.
//! Fails    with a [`TreeError`].

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Instant;

use uhmm_addr::{ByteSize, PAGE_SIZE};
use uhmm_core::pagemap::{DescriptorMemory, Pagemap};
use uhmm_devices::{Backing, OpenError, Opened};
use uhmm_sys::mapping::Mapping;
use uhmm_sys::memfd::Memfd;
use uhmm_sys::socket::{Connection, Listener};

use super::Keeper;
use crate::tree::orphan::Nursery;
use crate::tree::protocol::{FIRST_PFN, SOCKET_PREFIX};
use crate::tree::shared::{BLOCK_BYTES, BLOCKS, ProcessBlock, STATS_FILE_BYTES, Totals};

/// What is asked of every process of the tree.
#[derive(Clone, Copy, Debug)]
pub struct TreeOptions {
    /// How much each may have in RAM.
    pub budget: ByteSize,
    /// Act as if the kernel could not move frames.
    pub force_fallback: bool,
    /// Keep device pages that are still equal to pages in RAM.
    pub track: bool,
}

/// Why there is no keeper.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// The device cannot be shared.
    #[error(transparent)]
    Device(#[from] OpenError),
    /// No memory, no descriptors, or no sockets.
    #[error("cannot make {what}: {error}")]
    System {
        /// What was to be made.
        what: &'static str,
        /// What the kernel said.
        error: io::Error,
    },
}

fn system(what: &'static str) -> impl Fn(io::Error) -> TreeError {
    move |error| TreeError::System { what, error }
}

/// Everything that the keeper owns, before it is one.
pub struct Tree {
    pub(super) options: TreeOptions,
    pub(super) backing: Backing,
    pub(super) direct: bool,
    pub(super) device: OwnedFd,
    pub(super) descriptors: Memfd,
    pub(super) stats: Memfd,
    blocks: Mapping,
    agent: Memfd,
    room: Mapping,
    pub(super) pagemap: Pagemap,
    // Behind the pagemap, which points into it.
    _counts: Mapping,
    pub(super) listener: Listener,
    name: String,
}

impl Tree {
    /// Makes everything ready. `device` must have been opened for sharing, and without io_uring if the keeper
    /// is to be a forked process: rings do not survive that. `agent` is the library that is loaded into the
    /// programs.
    pub fn prepare(device: &Opened, agent: &[u8], options: TreeOptions) -> Result<Self, TreeError> {
        let handle = device.handle()?;
        let direct = match device {
            Opened::File(file) => file.direct(),
            Opened::Memory(_) => false,
        };
        let device = device.device();
        let bytes = DescriptorMemory::bytes_for(device.capacity()).next_multiple_of(PAGE_SIZE) as u64;
        let no_descriptors = system("the device's descriptors");
        let descriptors = Memfd::create("uhmm-descriptors", bytes, None).map_err(&no_descriptors)?;
        let counts = descriptors.map().map_err(&no_descriptors)?;
        let memory = DescriptorMemory::new(counts.as_ptr().cast());
        // SAFETY: the mapping is as long as the device needs, aligned to pages and all zero, and it lives in the
        // same structure, behind the pagemap. The file is for the descriptors of this device alone.
        let pagemap = unsafe { Pagemap::over(FIRST_PFN, device, memory) };
        let stats = Memfd::create("uhmm-stats", STATS_FILE_BYTES, None).map_err(system("the statistics"))?;
        let blocks = stats.map().map_err(system("the statistics"))?;
        let room = Mapping::reserve(Nursery::BYTES, "uhmm keeper").map_err(system("a buffer"))?;
        let library = library(agent).map_err(system("the agent's file"))?;
        let (listener, name) = Listener::bind_random(SOCKET_PREFIX).map_err(system("the keeper's socket"))?;
        Ok(Self {
            options,
            backing: handle.backing,
            direct,
            device: handle.fd,
            descriptors,
            stats,
            blocks,
            agent: library,
            room,
            pagemap,
            _counts: counts,
            listener,
            name,
        })
    }

    /// Where agents connect: the value of [`protocol::ENV_SOCKET`](crate::tree::protocol::ENV_SOCKET).
    pub fn socket_name(&self) -> &str {
        &self.name
    }

    /// The path of the agent's library, for `LD_PRELOAD`, by the number of the keeper's process; good as long as
    /// that lives.
    pub fn agent_path(&self) -> impl Fn(u32) -> String + use<> {
        let fd = self.agent.fd().as_raw_fd();
        move |keeper| format!("/proc/{keeper}/fd/{fd}")
    }

    /// The device, and who uses which of its pages.
    pub fn pagemap(&self) -> &Pagemap {
        &self.pagemap
    }

    /// Serves the tree until nobody is left. `front` is the connection to the process that wants reports.
    pub fn keep(self, front: Connection) {
        Keeper {
            free: (0..BLOCKS).rev().collect(),
            tree: self,
            front: Some(front),
            newcomers: Vec::new(),
            held: Vec::new(),
            agents: Vec::new(),
            orphans: Vec::new(),
            grown: Vec::new(),
            departed: Vec::new(),
            totals: Totals::default(),
            quiet_since: Instant::now(),
            swept: true,
            trimmed: Instant::now(),
        }
        .run();
    }

    pub(super) fn nursery(&self) -> Nursery<'_> {
        Nursery { pagemap: &self.pagemap, room: &self.room }
    }

    pub(super) fn block(&self, index: u32) -> &ProcessBlock {
        let offset = (index % BLOCKS) as usize * BLOCK_BYTES as usize;
        // SAFETY: the offset is that of a block inside of the mapping, which lives as long as `self`; all who
        // map the file use it as blocks.
        unsafe { ProcessBlock::at(self.blocks.as_ptr().add(offset)) }
    }
}

fn library(agent: &[u8]) -> io::Result<Memfd> {
    let size = agent.len().max(1).next_multiple_of(PAGE_SIZE) as u64;
    let file = Memfd::create("uhmm-agent", size, None)?;
    let mut at = 0;
    while at < agent.len() {
        at += rustix::io::pwrite(file.fd(), &agent[at..], at as u64)?;
    }
    Ok(file)
}
