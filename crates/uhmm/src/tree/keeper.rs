//! The keeper: the process that owns what outlives any one process of a tree.
//!
//! What     [`Tree`], made by the front process before it forks; [`Tree::keep`], the keeper's life: one thread
//!          that waits for messages, faults of orphans and the clock.
//! Why      a process can be killed at any moment, and its device pages must come free; a forked child can touch
//!          memory before its agent runs, and its parent may be gone by then.
//! Owns     the device, its descriptors, the statistics, the agent's library, the socket, and a copy of the
//!          descriptor of every page table. What agents allocate is accounted for by the words of their
//!          tables; when no process is left, everything that is not is freed too.
//! Locks    none. What agents and keeper share is atomic, or used by one side at a time.
//! Ends     when the front is gone and nobody has been connected for 2 s: exec closes and connects again.
//! Fails    [`TreeError`] in the making. Later, an agent that cannot be served is refused and ends its process.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use uhmm_addr::{ByteSize, PAGE_SIZE, PageCount};
use uhmm_core::pagemap::{DescriptorMemory, Pagemap};
use uhmm_devices::{Backing, OpenError, Opened};
use uhmm_sys::mapping::Mapping;
use uhmm_sys::memfd::Memfd;
use uhmm_sys::socket::{Connection, Listener, MAX_FDS};
use uhmm_sys::uffd::{Features, Uffd};

use super::orphan::{Nursery, Orphan, Standing, release};
use super::protocol::{
    self, FD_CHILD_TABLE, FD_CHILD_UFFD, FIRST_PFN, Farewell, ProtocolError, Refusal, Reply, Request,
    SOCKET_PREFIX, Welcome,
};
use super::shared::{BLOCK_BYTES, BLOCKS, ProcessBlock, STATS_FILE_BYTES, Totals};
use super::table::Table;

/// How long a child may wait for its parent to announce it.
const HOLD: Duration = Duration::from_secs(5);
/// How long somebody who connects may take to present himself.
const SHY: Duration = Duration::from_secs(5);
/// How long an orphan waits for its agent before its pages are brought home.
const CLAIM: Duration = Duration::from_secs(1);
/// How long after an agent hung up what it owned is freed: transfers of a killed process end meanwhile.
const SETTLE: Duration = Duration::from_millis(100);
/// How long the keeper stays when nobody is there.
const LINGER: Duration = Duration::from_secs(2);
/// How often space is given back.
const TRIM: Duration = Duration::from_secs(1);
/// Groups of 512 pages that are given back at a time.
const TRIM_GROUPS: usize = 256;

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
    options: TreeOptions,
    backing: Backing,
    direct: bool,
    device: OwnedFd,
    descriptors: Memfd,
    stats: Memfd,
    blocks: Mapping,
    agent: Memfd,
    room: Mapping,
    pagemap: Pagemap,
    // Behind the pagemap, which points into it.
    _counts: Mapping,
    listener: Listener,
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

    /// Where agents connect: the value of [`protocol::ENV_SOCKET`].
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
            trimmed: Instant::now(),
        }
        .run();
    }

    fn nursery(&self) -> Nursery<'_> {
        Nursery { pagemap: &self.pagemap, room: &self.room }
    }

    fn block(&self, index: u32) -> &ProcessBlock {
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

/// Somebody who has connected and not said who he is.
struct Newcomer {
    connection: Connection,
    since: Instant,
}

/// A child that came before its parent's message.
struct Held {
    connection: Connection,
    cookie: u64,
    pid: u32,
    since: Instant,
}

/// A process with an agent.
struct Agent {
    connection: Connection,
    table: Table,
    block: u32,
}

struct Keeper {
    tree: Tree,
    front: Option<Connection>,
    newcomers: Vec<Newcomer>,
    held: Vec<Held>,
    agents: Vec<Agent>,
    orphans: Vec<Orphan>,
    /// Forks whose children have all of their pages and came to nobody.
    grown: Vec<u64>,
    /// Page tables of processes that are gone.
    departed: Vec<(Instant, Table)>,
    free: Vec<u32>,
    totals: Totals,
    quiet_since: Instant,
    trimmed: Instant,
}

/// Whether a connection stays.
#[derive(PartialEq, Eq)]
enum Stay {
    Yes,
    No,
}

impl Keeper {
    fn run(mut self) {
        while !self.is_over() {
            let ready = self.wait();
            // From the back, so that what is removed does not move what is still to be looked at.
            for at in (0..self.orphans.len()).rev() {
                self.serve(at);
            }
            for at in ready.agents.into_iter().rev() {
                self.hear_agent(at);
            }
            for at in ready.newcomers.into_iter().rev() {
                self.hear_newcomer(at);
            }
            if ready.front {
                self.hear_front();
            }
            if ready.listener {
                self.accept();
            }
            self.match_held();
            self.settle();
        }
    }

    fn is_over(&mut self) -> bool {
        let busy = self.front.is_some()
            || !self.agents.is_empty()
            || !self.newcomers.is_empty()
            || !self.held.is_empty()
            || !self.orphans.is_empty()
            || !self.departed.is_empty();
        if busy {
            self.quiet_since = Instant::now();
        }
        self.quiet_since.elapsed() >= LINGER
    }

    /// Sleeps until something happens or is due.
    fn wait(&self) -> Ready {
        fn watch<'f>(fds: &mut Vec<PollFd<'f>>, fd: &'f impl AsFd) {
            fds.push(PollFd::new(fd, PollFlags::IN));
        }
        let mut fds = Vec::new();
        watch(&mut fds, &self.tree.listener);
        self.agents.iter().for_each(|agent| watch(&mut fds, &agent.connection));
        self.newcomers.iter().for_each(|newcomer| watch(&mut fds, &newcomer.connection));
        self.orphans.iter().for_each(|orphan| watch(&mut fds, &orphan.uffd));
        if let Some(front) = &self.front {
            watch(&mut fds, front);
        }
        let patience = self.patience();
        let timeout =
            Timespec { tv_sec: patience.as_secs() as i64, tv_nsec: i64::from(patience.subsec_nanos()) };
        if rustix::event::poll(&mut fds, Some(&timeout)).is_err() {
            return Ready::default();
        }
        let happened = |at: usize| !fds[at].revents().is_empty();
        let (agents, newcomers) = (self.agents.len(), self.newcomers.len());
        Ready {
            listener: happened(0),
            agents: (0..agents).filter(|at| happened(1 + at)).collect(),
            newcomers: (0..newcomers).filter(|at| happened(1 + agents + at)).collect(),
            front: self.front.is_some() && happened(fds.len() - 1),
        }
    }

    fn patience(&self) -> Duration {
        if self.orphans.iter().any(|orphan| orphan.has_waiting() || orphan.age() >= CLAIM) {
            return Duration::from_millis(1);
        }
        if !self.orphans.is_empty() || !self.held.is_empty() || !self.departed.is_empty() {
            return Duration::from_millis(20);
        }
        Duration::from_millis(if self.front.is_some() { 1000 } else { 200 })
    }

    // --- orphans ----------------------------------------------------------------------------------------

    fn serve(&mut self, at: usize) {
        let (nursery, mut born) = (self.tree.nursery(), Vec::new());
        let orphan = &mut self.orphans[at];
        let mut standing = orphan.serve(&nursery, &mut born);
        if standing == Standing::Alive && orphan.age() >= CLAIM && !orphan.has_waiting() {
            standing = orphan.step_home(&nursery);
        }
        if standing != Standing::Alive {
            let orphan = self.orphans.swap_remove(at);
            self.grown.extend(orphan.cookie.filter(|_| standing == Standing::Home));
            orphan.release(&nursery);
        }
        self.orphans.append(&mut born);
    }

    // --- agents -----------------------------------------------------------------------------------------

    fn accept(&mut self) {
        let me = rustix::process::geteuid().as_raw();
        if let Ok(connection) = self.tree.listener.accept()
            && connection.peer_credentials().is_ok_and(|(_, uid)| uid == me)
        {
            self.newcomers.push(Newcomer { connection, since: Instant::now() });
        }
    }

    fn hear_newcomer(&mut self, at: usize) {
        let connection = self.newcomers.swap_remove(at).connection;
        match receive(&connection) {
            Ok((Request::Hello { pid, cookie: 0 }, _)) => self.welcome(connection, pid, None),
            Ok((Request::Hello { pid, cookie }, _)) => {
                self.held.push(Held { connection, cookie, pid, since: Instant::now() });
            }
            Ok((Request::Report, _)) => self.report(&connection),
            Err(Unheard::Message(ProtocolError::Version(_))) => self.refuse(&connection, Refusal::Version),
            Ok(_) | Err(_) => {}
        }
    }

    /// Lets children in that have been announced, or that have waited too long for it.
    fn match_held(&mut self) {
        for at in (0..self.held.len()).rev() {
            let cookie = self.held[at].cookie;
            let found = self.orphans.iter().position(|orphan| orphan.cookie == Some(cookie));
            let grown = self.grown.iter().position(|grown| *grown == cookie);
            if let Some(found) = found {
                let held = self.held.swap_remove(at);
                let mut orphan = self.orphans.swap_remove(found);
                orphan.let_go();
                self.welcome(held.connection, held.pid, Some(orphan));
            } else if let Some(grown) = grown {
                // All of its pages are at home: it starts afresh.
                self.grown.swap_remove(grown);
                let held = self.held.swap_remove(at);
                self.welcome(held.connection, held.pid, None);
            } else if self.held[at].since.elapsed() >= HOLD {
                let held = self.held.swap_remove(at);
                self.refuse(&held.connection, Refusal::UnknownChild);
            }
        }
    }

    fn refuse(&mut self, connection: &Connection, why: Refusal) {
        self.totals.failed += 1;
        let _ = connection.send(Reply::Refused(why).encode(&mut protocol::buffer()), &[]);
    }

    fn welcome(&mut self, connection: Connection, pid: u32, orphan: Option<Orphan>) {
        let Some(block) = self.free.pop() else {
            self.refuse(&connection, Refusal::TooMany);
            self.abandon(orphan);
            return;
        };
        let (table, uffd) = match orphan {
            Some(orphan) => (Ok(orphan.table), Some(orphan.uffd)),
            None => (Table::create(), None),
        };
        let Ok(table) = table else {
            self.free.push(block);
            self.refuse(&connection, Refusal::Exhausted);
            return;
        };
        let counted = self.tree.block(block);
        counted.clear();
        counted.pid.store(u64::from(pid), Relaxed);
        self.totals.processes += 1;
        if self.send_welcome(&connection, block, &table, uffd.as_ref()).is_err() {
            // It is gone, and with it whoever could touch its pages.
            self.depart(table, block);
            return;
        }
        self.agents.push(Agent { connection, table, block });
    }

    fn send_welcome(
        &self,
        connection: &Connection,
        block: u32,
        table: &Table,
        uffd: Option<&Uffd>,
    ) -> io::Result<()> {
        let tree = &self.tree;
        let welcome = Welcome {
            budget: tree.options.budget,
            force_fallback: tree.options.force_fallback,
            track: tree.options.track,
            child: uffd.is_some(),
            features: uffd.map_or(Features::NONE, Uffd::features),
            backing: tree.backing,
            device_size: tree.pagemap.device().capacity().size(),
            direct: tree.direct,
            block,
        };
        let files = [tree.device.as_fd(), tree.descriptors.fd(), tree.stats.fd(), table.as_fd()];
        let files: Vec<BorrowedFd<'_>> = files.into_iter().chain(uffd.map(AsFd::as_fd)).collect();
        connection.send(Reply::Welcome(welcome).encode(&mut protocol::buffer()), &files)
    }

    /// A child whose agent was refused ends itself; until it has, it is served.
    fn abandon(&mut self, orphan: Option<Orphan>) {
        self.orphans.extend(orphan.map(Orphan::unexpected));
    }

    fn hear_agent(&mut self, at: usize) {
        if self.obey_agent(at) == Stay::No {
            let Agent { table, block, .. } = self.agents.swap_remove(at);
            self.depart(table, block);
        }
    }

    fn obey_agent(&mut self, at: usize) -> Stay {
        let agent = &self.agents[at];
        match receive(&agent.connection) {
            Ok((Request::Child { cookie, features }, mut files)) => {
                let (uffd, table) = (files[FD_CHILD_UFFD].take(), files[FD_CHILD_TABLE].take());
                if let (Some(uffd), Some(Ok(table))) = (uffd, table.map(Table::adopt)) {
                    let uffd = Uffd::from_fd(uffd, features);
                    self.orphans.push(Orphan::new(Some(cookie), uffd, table));
                    self.serve(self.orphans.len() - 1);
                }
                Stay::Yes
            }
            Ok((Request::Goodbye(why), _)) => {
                let block = self.tree.block(agent.block);
                match why {
                    Farewell::Exit => {}
                    Farewell::DeviceFull | Farewell::OutOfMemory => {
                        block.out_of_memory.fetch_max(1, Relaxed);
                    }
                    Farewell::Failed => self.totals.failed += 1,
                }
                Stay::Yes
            }
            Ok((Request::Report, _)) => {
                reply_totals(&agent.connection, &self.sum());
                Stay::Yes
            }
            // Said twice, or nonsense: a broken agent is still one whose pages must be kept.
            Ok((Request::Hello { .. }, _)) | Err(Unheard::Message(_)) => Stay::Yes,
            Err(Unheard::Closed) => Stay::No,
        }
    }

    /// A process is gone, or has become another program.
    fn depart(&mut self, table: Table, block: u32) {
        let counted = self.tree.block(block);
        self.totals.fold(counted);
        counted.clear();
        self.free.push(block);
        self.departed.push((Instant::now(), table));
    }

    // --- the front ---------------------------------------------------------------------------------------

    fn hear_front(&mut self) {
        let Some(front) = self.front.take() else { return };
        match receive(&front) {
            Ok((Request::Report, _)) => self.report(&front),
            Ok(_) | Err(Unheard::Message(_)) => {}
            Err(Unheard::Closed) => return,
        }
        self.front = Some(front);
    }

    fn report(&self, to: &Connection) {
        reply_totals(to, &self.sum());
    }

    /// What the dead have counted, and the living so far.
    fn sum(&self) -> Totals {
        let mut totals = self.totals;
        for agent in &self.agents {
            totals.fold(self.tree.block(agent.block));
        }
        totals.device_pages = self.tree.pagemap.live().get() as u64;
        totals
    }

    // --- the clock ---------------------------------------------------------------------------------------

    fn settle(&mut self) {
        self.newcomers.retain(|newcomer| newcomer.since.elapsed() < SHY);
        let nursery = self.tree.nursery();
        self.departed.retain(|(since, table)| {
            let due = since.elapsed() >= SETTLE;
            if due {
                release(table, &nursery);
            }
            !due
        });
        if self.trimmed.elapsed() >= TRIM {
            self.trimmed = Instant::now();
            self.sweep();
            self.tree.pagemap.trim(TRIM_GROUPS);
        }
    }

    /// Frees what no table accounts for, once there is no table: what a process held in its own memory when it
    /// was killed.
    fn sweep(&self) {
        let nobody = self.agents.is_empty()
            && self.orphans.is_empty()
            && self.held.is_empty()
            && self.departed.is_empty();
        if nobody && self.tree.pagemap.live() != PageCount::ZERO {
            self.tree.pagemap.free_all();
        }
    }
}

/// Who has something to say.
#[derive(Default)]
struct Ready {
    listener: bool,
    agents: Vec<usize>,
    newcomers: Vec<usize>,
    front: bool,
}

/// Why nothing was heard.
enum Unheard {
    Closed,
    Message(ProtocolError),
}

type Files = [Option<OwnedFd>; MAX_FDS];

fn receive(connection: &Connection) -> Result<(Request, Files), Unheard> {
    let (mut buffer, mut files) = (protocol::buffer(), Files::default());
    match connection.recv(&mut buffer, &mut files) {
        Ok(0) => Err(Unheard::Closed),
        Ok(len) => match Request::decode(&buffer[..len]) {
            Ok(request) => Ok((request, files)),
            Err(error) => Err(Unheard::Message(error)),
        },
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::MSGSIZE.raw_os_error()) => {
            Err(Unheard::Message(ProtocolError::Length { kind: 0, bytes: buffer.len() + 1 }))
        }
        Err(_) => Err(Unheard::Closed),
    }
}

fn reply_totals(to: &Connection, totals: &Totals) {
    let _ = to.send(totals.encode(&mut protocol::buffer()), &[]);
}
