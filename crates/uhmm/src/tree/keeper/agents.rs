//! Agents: the processes that have been let in.
//!
//! What     [`Agent`], what the keeper has of each; what it says, and that it is gone.
//! Why      a killed process says nothing: that its connection closes is the only word there always is.
//! Owns     the connection, a descriptor of the page table and a block of the statistics. What the table names
//!          is freed later, when transfers of the process have ended.
//! Fails    a message without sense is passed over: a broken agent is still one whose pages must be kept.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use uhmm_sys::socket::Connection;
use uhmm_sys::uffd::Uffd;

use super::{Keeper, Unheard, receive, reply_totals};
use crate::tree::orphan::Orphan;
use crate::tree::protocol::{FD_CHILD_TABLE, FD_CHILD_UFFD, Farewell, Request};
use crate::tree::table::Table;

/// A process with an agent.
pub(super) struct Agent {
    pub(super) connection: Connection,
    pub(super) table: Table,
    pub(super) block: u32,
}

/// Whether a connection stays.
#[derive(PartialEq, Eq)]
enum Stay {
    Yes,
    No,
}

impl Keeper {
    pub(super) fn hear_agent(&mut self, at: usize) {
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
    pub(super) fn depart(&mut self, table: Table, block: u32) {
        let counted = self.tree.block(block);
        self.totals.fold(counted);
        counted.clear();
        self.free.push(block);
        self.departed.push((Instant::now(), table));
    }
}
