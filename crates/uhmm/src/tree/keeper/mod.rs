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
//! Rooms    `tree` is what the keeper owns; `admission` lets processes in, `agents` are those that are. Here are
//!          the loop, the orphans, the front and the clock.

mod admission;
mod agents;
mod tree;

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use uhmm_sys::socket::{Connection, MAX_FDS};

pub use tree::{Tree, TreeError, TreeOptions};

use super::orphan::{Orphan, Standing, release};
use super::protocol::{self, ProtocolError, Request};
use super::shared::Totals;
use super::table::Table;
use admission::{Held, Newcomer};
use agents::Agent;

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
    /// Whether nothing is left of those who were here.
    swept: bool,
    trimmed: Instant,
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
        self.swept &= self.is_deserted();
        if self.trimmed.elapsed() >= TRIM {
            self.trimmed = Instant::now();
            self.sweep();
            self.tree.pagemap.trim(TRIM_GROUPS);
        }
    }

    /// Frees what no table accounts for, once there is no table: what a process held in its own memory when it
    /// was killed, and what it had begun, which no count tells of. Once is enough until somebody comes.
    fn sweep(&mut self) {
        if !self.is_deserted() || self.swept {
            return;
        }
        // SAFETY: the keeper's pagemap is in no registry, and nobody else is there who has its descriptors.
        unsafe { self.tree.pagemap.free_all() };
        self.swept = true;
    }

    /// Whether there is nobody who has, or may be about to get, pages of the device.
    fn is_deserted(&self) -> bool {
        self.agents.is_empty()
            && self.newcomers.is_empty()
            && self.orphans.is_empty()
            && self.held.is_empty()
            && self.departed.is_empty()
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
