//! From the constructor, or the child of a fork, to running threads.
//!
//! The first raw thread is started without the program's file table, closes its copies of the program's
//! files (a pipe held open here would keep somebody waiting for its end), connects to the keeper, builds the
//! address space, starts the evictor, and becomes the first handler. Threads that only help with faults come with
//! the faults: a program ends, or becomes another one, when its last thread has ended, and the one of lowest priority
//! takes its time where processors are busy. Most children of a shell have no faults.

use std::ffi::CStr;
use std::io;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use uhmm::engine::threads::{self, Crew, Role, serve};
use uhmm::managed::{BuildError, Managed, Plan, Reports, TABLE_BYTES};
use uhmm::tree::client::{self, ClientError, Joined};
use uhmm::tree::protocol::{self, Welcome};
use uhmm::tree::shared::ProcessBlock;
use uhmm_addr::{ByteSize, PageCount};
use uhmm_core::fault::window::Windows;
use uhmm_core::pagemap::{DescriptorMemory, Pagemap};
use uhmm_devices::{Handle, OpenError};
use uhmm_sys::futex::{self, Lock};
use uhmm_sys::limits::MoreFiles;
use uhmm_sys::mapping::Mapping;
use uhmm_sys::memfd::Memfd;
use uhmm_sys::placement;
use uhmm_sys::thread::{Files, RawThread, close_all_files_except};

use crate::adopt::ProcessGauge;
use crate::process::{Agent, THREADS};
use crate::{HEAP, evict};

const STACK: usize = 512 << 10;
const STARTING: u32 = 0;
const READY: u32 = 1;
const FAILED: u32 = 2;
/// Pages that a random fault brings home: neighbours of a page that is needed at random push out pages that
/// are needed as much.
const RANDOM_WINDOW: PageCount = PageCount::ONE;
/// Addresses for frames on their way out.
const ARENA: ByteSize = ByteSize::gib(1);

/// Why there is no agent in this process.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("there is no room for its heap")]
    Heap,
    #[error("its tables have no room in the address space (ulimit -v)")]
    Room(#[source] io::Error),
    #[error("its first thread cannot be started")]
    First(#[source] io::Error),
    #[error("its threads cannot be started")]
    Thread(#[source] io::Error),
    #[error(transparent)]
    Keeper(#[from] ClientError),
    #[error("the device of this uhmm run cannot be used")]
    Device(#[from] OpenError),
    #[error("memory of this uhmm run cannot be mapped")]
    Map(#[source] io::Error),
    #[error("its memory cannot be measured")]
    Gauge(#[source] io::Error),
    #[error(transparent)]
    Build(#[from] BuildError),
}

impl StartError {
    /// Whether a forked child does well without an agent: the keeper, to which its parent has handed it over, goes
    /// on serving it, and brings its pages home.
    pub const fn is_looked_after(&self) -> bool {
        match self {
            Self::Heap | Self::Room(_) | Self::First(_) => true,
            Self::Keeper(ClientError::Refused(why)) => why.is_looked_after(),
            _ => false,
        }
    }
}

/// The name of the keeper's socket.
static SOCKET: Lock<[u8; 64]> = Lock::new([0; 64]);

/// What the starting thread and the first raw thread share.
struct Start {
    cookie: u64,
    state: AtomicU32,
    error: Lock<Option<StartError>>,
}

/// Remembers the keeper's socket; `false` if the name is no such name.
pub fn remember_socket(name: &CStr) -> bool {
    let mut place = SOCKET.lock();
    let bytes = name.to_bytes();
    if bytes.is_empty() || bytes.len() >= place.len() {
        return false;
    }
    place[..bytes.len()].copy_from_slice(bytes);
    true
}

/// Starts the agent's threads and waits until they serve. `cookie` is the number of the fork that made this
/// process, 0 for a fresh one.
pub fn start(cookie: u64) -> Result<(), StartError> {
    if !HEAP.is_there() {
        return Err(StartError::Heap);
    }
    let start = Arc::new(Start { cookie, state: AtomicU32::new(STARTING), error: Lock::new(None) });
    let stack = Mapping::reserve(STACK, "uhmm-stack").map_err(StartError::First)?;
    let arg = Arc::into_raw(start.clone()).cast_mut().cast();
    // SAFETY: `first` keeps to the rules of raw threads; the argument is what it expects. Nobody knows the
    // stack. The caller is the constructor's or the forking thread.
    unsafe { RawThread::spawn(c"uhmm", stack, Files::Own, first, arg) }.map_err(StartError::First)?;
    while start.state.load(Ordering::Acquire) == STARTING {
        let _ = futex::wait(&start.state, STARTING, Some(Duration::from_secs(1)));
    }
    match start.error.lock().take() {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// Tells the program's user that something went wrong.
pub fn complain(error: &StartError) {
    if let StartError::Heap = error {
        // Nothing can be put together without a heap.
        return say("uhmm: a process has no room for uhmm in its address space (ulimit -v)\n");
    }
    let mut text = format!("uhmm: process {}: {error}", rustix::process::getpid().as_raw_nonzero());
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    if error.is_looked_after() {
        text.push_str("; it goes on without uhmm");
    }
    text.push('\n');
    say(&text);
}

fn say(text: &str) {
    // SAFETY: descriptor 2 is only written to; if the program closed it, that fails.
    let stderr = unsafe { rustix::fd::BorrowedFd::borrow_raw(2) };
    let _ = rustix::io::write(stderr, text.as_bytes());
}

extern "C" fn first(arg: *mut u8) {
    // SAFETY: `start` passed a reference count of its own.
    let start = unsafe { Arc::from_raw(arg.cast::<Start>()) };
    // SAFETY: this thread has a file table of its own, and no descriptor in it is anybody's.
    let _ = unsafe { close_all_files_except(&[]) };
    // Two low numbers, free from now on: a program may lower its limit of descriptors and then fork, and a fork
    // needs one for what watches the child and one for its table.
    let more_files = MoreFiles::allow();
    let low = rustix::pipe::pipe();
    let built = connect(start.cookie).and_then(|agent| {
        let agent = agent.publish();
        let gauge = ProcessGauge::open(agent).map_err(StartError::Gauge)?;
        drop((low, more_files));
        // Behind all that can fail: with it, memory begins to be managed.
        spawn(c"uhmm-evict", evictor, Box::into_raw(Box::new(gauge)).cast())?;
        Ok(agent)
    });
    let (state, agent) = match built {
        Ok(agent) => (READY, Some(agent)),
        Err(error) => {
            *start.error.lock() = Some(error);
            (FAILED, None)
        }
    };
    start.state.store(state, Ordering::Release);
    futex::wake(&start.state, u32::MAX);
    drop(start);
    if let Some(agent) = agent {
        handle(agent, Role::First);
    }
}

/// Starts the threads that make faults cheaper. To be called by the evictor, which may run everywhere, allocate and
/// wait.
pub fn help() {
    let Ok(cpus) = placement::allowed_cpus() else { return };
    if cpus.count() > 1 {
        // Where no more threads are allowed, it is slower without them.
        for cpu in cpus.iter() {
            let place = Box::into_raw(Box::new(cpu));
            let _ = spawn(c"uhmm-pinned", pinned, place.cast());
        }
        let _ = spawn(c"uhmm-awake", keep_awake, ptr::null_mut());
    }
}

fn spawn(name: &CStr, entry: extern "C" fn(*mut u8), arg: *mut u8) -> Result<(), StartError> {
    let stack = Mapping::reserve(STACK, "uhmm-stack").map_err(StartError::Thread)?;
    // SAFETY: the entries of this file keep to the rules of raw threads and get what they expect; nobody
    // knows the stack; an ordinary thread started the caller.
    unsafe { RawThread::spawn(name, stack, Files::Shared, entry, arg) }.map_err(StartError::Thread)?;
    Ok(())
}

extern "C" fn evictor(gauge: *mut u8) {
    // SAFETY: `first` made the box for this thread.
    let gauge = *unsafe { Box::from_raw(gauge.cast::<ProcessGauge>()) };
    if let Some(agent) = Agent::get() {
        evict::run(agent, gauge);
    }
}

extern "C" fn pinned(cpu: *mut u8) {
    // SAFETY: `first` made the box for this thread.
    let cpu = *unsafe { Box::from_raw(cpu.cast::<u32>()) };
    if let Some(agent) = Agent::get() {
        handle(agent, Role::Pinned(cpu));
    }
}

extern "C" fn keep_awake(_: *mut u8) {
    if let Some(agent) = Agent::get() {
        threads::keep_awake(&agent.managed, &agent.crew);
    }
}

fn handle(agent: &'static Agent, role: Role) {
    let Ok((mut scratch, _buffer)) = Managed::scratch() else { return };
    serve(&agent.managed, &agent.crew, agent, role, &mut scratch);
}

fn connect(cookie: u64) -> Result<Agent, StartError> {
    let name = SOCKET.lock();
    let len = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    let name = str::from_utf8(&name[..len]).unwrap_or_default();
    // While the keeper has the child it does well without us; afterwards it depends on us.
    let room =
        Mapping::reserve(TABLE_BYTES + ARENA.bytes() as usize, "uhmm-room").map_err(StartError::Room)?;
    drop(room);
    let Joined { connection, welcome, device, descriptors, stats, table, uffd } = client::join(name, cookie)?;
    let table = Memfd::from_fd(table).map_err(StartError::Map)?;
    let device = uhmm_devices::from_handle(Handle {
        backing: welcome.backing,
        size: welcome.device_size,
        fd: device,
    })?;
    let memory = Memfd::from_fd(descriptors).and_then(|memfd| memfd.map()).map_err(StartError::Map)?;
    let words = DescriptorMemory::new(memory.as_ptr().cast());
    // SAFETY: the keeper made the file as long as the device needs, for this device; the mapping is leaked.
    let pagemap = Arc::new(unsafe { Pagemap::over(protocol::FIRST_PFN, device, words) });
    memory.leak();
    let block = map_block(&welcome, stats)?;
    let plan = Plan {
        reports: Reports::Messages,
        table: Some(table.map().map_err(StartError::Map)?),
        arena: arena_for(welcome.budget),
        huge: None,
        pagemaps: vec![pagemap.clone()],
        windows: Windows::new(RANDOM_WINDOW, uhmm_core::fault::MAX_WINDOW),
        track: welcome.track,
        forced_fallback: welcome.force_fallback,
        stats: Some(&block.stats),
    };
    let managed = match uffd {
        Some(uffd) => Managed::on(uffd, plan)?,
        None => Managed::build(plan)?,
    };
    Ok(Agent {
        managed: Arc::new(managed),
        pagemap,
        crew: Crew::new(&THREADS),
        budget: welcome.budget.pages(),
        block,
        keeper: Lock::new(connection),
        table,
        full: AtomicBool::new(false),
        faults: AtomicU32::new(0),
    })
}

/// Slots enough for the second chance and what is being written, with room for fragments.
fn arena_for(budget: ByteSize) -> ByteSize {
    let most = ByteSize::new(budget.bytes().next_multiple_of(2 << 20));
    most.clamp(ByteSize::mib(32), ARENA)
}

fn map_block(welcome: &Welcome, stats: rustix::fd::OwnedFd) -> Result<&'static ProcessBlock, StartError> {
    let len = uhmm::tree::shared::BLOCK_BYTES as usize;
    let mapping = Mapping::shared(rustix::fd::AsFd::as_fd(&stats), welcome.block_offset(), len, "")
        .map_err(StartError::Map)?;
    let start: NonNull<u8> = mapping.as_ptr();
    mapping.leak();
    // SAFETY: the keeper gave this process the block at that offset; the mapping is leaked.
    Ok(unsafe { ProcessBlock::at(start) })
}
