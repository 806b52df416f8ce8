//! How an agent, and the front process, talk to the keeper.
//!
//! What     [`join`], with which a process presents itself; [`announce`], with which it hands a forked child
//!          over; [`farewell`]; [`report`], the front's question.
//! Why      the order of descriptors and the limits of patience stand in one place.
//! Owns     what arrives, until it is taken.
//! Fails    with a [`ClientError`]. Nothing here allocates or uses thread-local storage, unless an error does,
//!          so that agents may call it from their own threads.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use uhmm_sys::socket::{Connection, MAX_FDS};
use uhmm_sys::uffd::Uffd;

use super::protocol::{
    self, FD_DESCRIPTORS, FD_DEVICE, FD_STATS, FD_TABLE, FD_UFFD, Farewell, ProtocolError, Refusal, Reply,
    Request, Welcome,
};
use super::shared::Totals;

/// The keeper holds a child back for 5 s at most; it is gone if it says nothing for so long.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why the keeper could not be asked, or what it said.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// It cannot be reached, or it has gone.
    #[error("the keeper of this uhmm run cannot be reached: {0}")]
    Io(#[from] io::Error),
    /// It hung up.
    #[error("the keeper of this uhmm run has hung up")]
    Closed,
    /// It speaks another language.
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    /// It refused.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Files did not come along with its answer.
    #[error("the keeper's answer came without the file {0}")]
    MissingFile(&'static str),
}

/// What a process got from the keeper.
#[derive(Debug)]
pub struct Joined {
    /// The keeper cleans up after this process when it closes. Keep it open, out of the program's reach.
    pub connection: Connection,
    /// What to know.
    pub welcome: Welcome,
    /// The device's memory or file.
    pub device: OwnedFd,
    /// The device's descriptors.
    pub descriptors: OwnedFd,
    /// The tree's statistics; this process's block is at [`Welcome::block_offset`].
    pub stats: OwnedFd,
    /// The page table of this process.
    pub table: OwnedFd,
    /// For a child that was handed over: what watches it. From now on this process serves it.
    pub uffd: Option<Uffd>,
}

/// Presents this process to the keeper at `name`. `cookie` is 0 for a fresh process, else the number of the
/// fork whose child it is.
pub fn join(name: &str, cookie: u64) -> Result<Joined, ClientError> {
    let connection = Connection::connect(name)?;
    connection.set_receive_timeout(Some(PATIENCE))?;
    let mut buffer = protocol::buffer();
    let pid = rustix::process::getpid().as_raw_pid() as u32;
    connection.send(Request::Hello { pid, cookie }.encode(&mut buffer), &[])?;
    let mut files: [Option<OwnedFd>; MAX_FDS] = Default::default();
    let len = connection.recv(&mut buffer, &mut files)?;
    let welcome = match decode(&buffer[..len], Reply::decode)? {
        Reply::Welcome(welcome) => welcome,
        Reply::Refused(why) => return Err(why.into()),
    };
    let mut take = |at: usize, what| files[at].take().ok_or(ClientError::MissingFile(what));
    let device = take(FD_DEVICE, "of the device")?;
    let descriptors = take(FD_DESCRIPTORS, "of descriptors")?;
    let stats = take(FD_STATS, "of statistics")?;
    let table = take(FD_TABLE, "of the page table")?;
    let uffd = if welcome.child {
        Some(Uffd::from_fd(take(FD_UFFD, "that watches the child")?, welcome.features))
    } else {
        None
    };
    Ok(Joined { connection, welcome, device, descriptors, stats, table, uffd })
}

/// Hands a forked child over: `uffd` as it came with the fork event, and its page table, in which every word
/// is at rest (empty, resident, on the device or poisoned) and owns a reference on its device page.
/// The caller closes its copies of both afterwards.
pub fn announce(
    connection: &Connection,
    cookie: u64,
    uffd: &Uffd,
    table: BorrowedFd<'_>,
) -> Result<(), ClientError> {
    let mut buffer = protocol::buffer();
    let request = Request::Child { cookie, features: uffd.features() };
    connection.send(request.encode(&mut buffer), &[uffd.as_fd(), table])?;
    Ok(())
}

/// Says why this process is about to end.
pub fn farewell(connection: &Connection, why: Farewell) -> Result<(), ClientError> {
    connection.send(Request::Goodbye(why).encode(&mut protocol::buffer()), &[])?;
    Ok(())
}

/// Asks for what happened so far.
pub fn report(connection: &Connection) -> Result<Totals, ClientError> {
    let mut buffer = protocol::buffer();
    connection.set_receive_timeout(Some(PATIENCE))?;
    connection.send(Request::Report.encode(&mut buffer), &[])?;
    let len = connection.recv(&mut buffer, &mut Default::default())?;
    decode(&buffer[..len], Totals::decode)
}

fn decode<T>(bytes: &[u8], decode: impl FnOnce(&[u8]) -> Result<T, ProtocolError>) -> Result<T, ClientError> {
    if bytes.is_empty() { Err(ClientError::Closed) } else { Ok(decode(bytes)?) }
}
