//! Admission: from somebody who connects to a process with an agent.
//!
//! What     a [`Newcomer`] has said nothing yet; a [`Held`] is a child whose parent has not announced it; whoever
//!          is welcomed is an [`Agent`].
//! Why      a child and its parent's message come by different connections, in either order.
//! Owns     the connections, until somebody is welcomed or refused.
//! Trust    processes of the same user are heard, nobody else.
//! Fails    whoever cannot be welcomed is told why ([`Refusal`]). A child goes on being served until it has ended
//!          itself, or all of its pages are at home.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use uhmm_sys::socket::Connection;
use uhmm_sys::uffd::{Features, Uffd};

use super::agents::Agent;
use super::{Keeper, Unheard, receive};
use crate::tree::orphan::Orphan;
use crate::tree::protocol::{self, ProtocolError, Refusal, Reply, Request, Welcome};
use crate::tree::table::Table;

/// Processes of other users that may be about to speak.
const STRANGERS: usize = 64;
/// How long a child may wait for its parent to announce it.
const HOLD: Duration = Duration::from_secs(5);

/// Somebody who has connected and not said who he is.
pub(super) struct Newcomer {
    pub(super) connection: Connection,
    /// Of the same user.
    ours: bool,
    pub(super) since: Instant,
}

/// A child that came before its parent's message.
pub(super) struct Held {
    connection: Connection,
    cookie: u64,
    pid: u32,
    since: Instant,
}

impl Keeper {
    pub(super) fn accept(&mut self) {
        let me = rustix::process::geteuid().as_raw();
        let Ok(connection) = self.tree.listener.accept() else { return };
        let ours = connection.peer_credentials().is_ok_and(|(_, uid)| uid == me);
        let strangers = self.newcomers.iter().filter(|newcomer| !newcomer.ours).count();
        if ours || strangers < STRANGERS {
            self.newcomers.push(Newcomer { connection, ours, since: Instant::now() });
        }
    }

    pub(super) fn hear_newcomer(&mut self, at: usize) {
        let Newcomer { connection, ours, .. } = self.newcomers.swap_remove(at);
        if !ours {
            // Perhaps a child whose parent has become somebody else. What it says, and that it came, counts for
            // nothing.
            let _ = receive(&connection);
            let _ = connection.send(Reply::Refused(Refusal::Foreign).encode(&mut protocol::buffer()), &[]);
            return;
        }
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
    pub(super) fn match_held(&mut self) {
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

    /// A child whose agent was refused is served until it needs nobody.
    fn abandon(&mut self, orphan: Option<Orphan>) {
        self.orphans.extend(orphan.map(Orphan::unexpected));
    }
}
