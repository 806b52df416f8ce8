//! Messages between processes, with descriptors.
//!
//! What     [`Listener`] and [`Connection`]: sockets of the kind that keeps messages apart, under a name that is
//!          not in the file system.
//! Why      a program, its agent and its forked children hand each other userfaultfds and memory.
//! Owns     each its descriptor. Descriptors that arrive are closed on drop and on exec.
//! Fails    with the kernel's error; a message that does not fit is an error and never cut short. An end of
//!          the connection is a message of no bytes, so that empty ones are not sent. No signal is raised.
//!
//! Sending and receiving work in raw threads: no allocation and no thread-local storage.

use core::fmt::Write as _;
use core::mem::MaybeUninit;
use core::time::Duration;
use std::io::{self, IoSlice, IoSliceMut};

use linux_raw_sys::general as sys;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{
    self, AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

use crate::thread::raw;

/// How many descriptors a message carries at most.
pub const MAX_FDS: usize = 8;

/// Connections that wait to be accepted, at most.
const BACKLOG: i32 = 64;

fn socket() -> Result<OwnedFd, Errno> {
    net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
}

/// A name at which others connect; gone when dropped.
#[derive(Debug)]
pub struct Listener {
    fd: OwnedFd,
}

impl Listener {
    /// Listens at a name that starts with `prefix` and that nobody can guess, and gives the name. Every
    /// process of the network namespace may connect: check [`Connection::peer_credentials`].
    pub fn bind_random(prefix: &str) -> io::Result<(Self, String)> {
        loop {
            let mut name = String::from(prefix);
            for byte in random()? {
                // Writing to a string cannot fail.
                let _ = write!(name, "{byte:02x}");
            }
            let address = SocketAddrUnix::new_abstract_name(name.as_bytes())?;
            let fd = socket()?;
            match net::bind(&fd, &address) {
                Err(Errno::ADDRINUSE) => continue,
                other => other?,
            }
            net::listen(&fd, BACKLOG)?;
            return Ok((Self { fd }, name));
        }
    }

    /// Waits for somebody to connect.
    pub fn accept(&self) -> io::Result<Connection> {
        let fd = retry_on_intr(|| net::accept_with(&self.fd, SocketFlags::CLOEXEC))?;
        Ok(Connection { fd })
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn random() -> Result<[u8; 16], Errno> {
    let mut bytes = [0_u8; 16];
    // SAFETY: the kernel writes at most as many bytes as the array has.
    let got =
        unsafe { raw::syscall(sys::__NR_getrandom, [bytes.as_mut_ptr() as usize, bytes.len(), 0, 0, 0]) }?;
    // The kernel never gives less for so few.
    if got == bytes.len() { Ok(bytes) } else { Err(Errno::AGAIN) }
}

/// One end of a connection.
#[derive(Debug)]
pub struct Connection {
    fd: OwnedFd,
}

impl Connection {
    /// Connects to the listener at `name`.
    pub fn connect(name: &str) -> io::Result<Self> {
        let address = SocketAddrUnix::new_abstract_name(name.as_bytes())?;
        let fd = socket()?;
        retry_on_intr(|| net::connect(&fd, &address))?;
        Ok(Self { fd })
    }

    /// Two ends of one connection, for a process and the child that it forks.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (one, two) =
            net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Ok((Self { fd: one }, Self { fd: two }))
    }

    /// Sends one message of at least a byte, with up to [`MAX_FDS`] descriptors.
    pub fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        if bytes.is_empty() || fds.len() > MAX_FDS {
            return Err(Errno::INVAL.into());
        }
        let parts = [IoSlice::new(bytes)];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let sent = retry_on_intr(|| {
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(Errno::INVAL);
            }
            net::sendmsg(&self.fd, &parts, &mut control, SendFlags::NOSIGNAL)
        })?;
        // Messages of this kind go whole or not at all.
        if sent == bytes.len() { Ok(()) } else { Err(Errno::MSGSIZE.into()) }
    }

    /// Waits for one message; says how many bytes it has, and puts its descriptors into `fds`, from the front,
    /// dropping what was there. No bytes: the other end is closed. `EMSGSIZE`: it had more bytes than `buf`,
    /// or descriptors that could not be taken; it is gone. `EAGAIN`: the time of
    /// [`Connection::set_receive_timeout`] is over.
    pub fn recv(&self, buf: &mut [u8], fds: &mut [Option<OwnedFd>; MAX_FDS]) -> io::Result<usize> {
        fds.fill_with(|| None);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let mut parts = [IoSliceMut::new(buf)];
            match net::recvmsg(&self.fd, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Err(Errno::INTR) => continue,
                other => break other?,
            }
        };
        let mut places = fds.iter_mut();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(arrived) = message {
                for fd in arrived {
                    // There are as many places as descriptors fit into the buffer.
                    if let Some(place) = places.next() {
                        *place = Some(fd);
                    }
                }
            }
        }
        if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
            fds.fill_with(|| None);
            return Err(Errno::MSGSIZE.into());
        }
        Ok(received.bytes)
    }

    /// How long [`Connection::recv`] waits; `None` for ever. Less than a microsecond counts as one.
    pub fn set_receive_timeout(&self, limit: Option<Duration>) -> io::Result<()> {
        let limit = limit.map(|time| time.max(Duration::from_micros(1)));
        Ok(sockopt::set_socket_timeout(&self.fd, Timeout::Recv, limit)?)
    }

    /// The process and the user at the other end, as they were when the connection was made.
    pub fn peer_credentials(&self) -> io::Result<(u32, u32)> {
        let peer = sockopt::socket_peercred(&self.fd)?;
        Ok((peer.pid.as_raw_pid() as u32, peer.uid.as_raw()))
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<OwnedFd> for Connection {
    /// The end of a connection that arrived as a descriptor.
    fn from(fd: OwnedFd) -> Self {
        Self { fd }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nothing() -> [Option<OwnedFd>; MAX_FDS] {
        Default::default()
    }

    #[test]
    fn messages_and_descriptors_arrive_whole() {
        let (listener, name) = Listener::bind_random("uhmm-test-").unwrap();
        assert!(name.starts_with("uhmm-test-") && name.len() == 42);
        let one = Connection::connect(&name).unwrap();
        let two = listener.accept().unwrap();
        let me = (std::process::id(), rustix::process::getuid().as_raw());
        assert_eq!((one.peer_credentials().unwrap(), two.peer_credentials().unwrap()), (me, me));
        let (reader, writer) = std::io::pipe().unwrap();
        one.send(b"first", &[]).unwrap();
        one.send(b"second", &[writer.as_fd(), reader.as_fd()]).unwrap();
        drop(writer);
        let (mut buf, mut fds) = ([0; 64], nothing());
        assert_eq!(two.recv(&mut buf, &mut fds).unwrap(), 5);
        assert!(fds.iter().all(Option::is_none));
        assert_eq!(two.recv(&mut buf, &mut fds).unwrap(), 6);
        assert_eq!((&buf[..6], fds.iter().flatten().count()), (&b"second"[..], 2));
        let arrived = fds[0].as_ref().unwrap();
        assert!(rustix::io::fcntl_getfd(arrived).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
        rustix::io::write(arrived, b"x").unwrap();
        assert_eq!(rustix::io::read(&reader, &mut buf).unwrap(), 1);
        drop(one);
        assert_eq!(two.recv(&mut buf, &mut fds).unwrap(), 0);
        assert!(fds[0].is_none());
        // A closed peer is an error and no signal.
        assert_eq!(two.send(b"x", &[]).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let (one, two) = Connection::pair().unwrap();
        let (mut buf, mut fds) = ([0; 4], nothing());
        one.send(b"longer", &[]).unwrap();
        one.send(b"next", &[]).unwrap();
        let error = two.recv(&mut buf, &mut fds).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::MSGSIZE.raw_os_error()));
        assert_eq!(two.recv(&mut buf, &mut fds).unwrap(), 4);
        assert!(one.send(b"", &[]).is_err());
        assert!(one.send(b"x", &[one.as_fd(); MAX_FDS + 1]).is_err());
        one.send(b"x", &[one.as_fd(); MAX_FDS]).unwrap();
        assert_eq!(two.recv(&mut buf, &mut fds).unwrap(), 1);
        assert!(fds.iter().all(Option::is_some));
    }

    #[test]
    fn waiting_ends_when_the_time_is_over() {
        let (_one, two) = Connection::pair().unwrap();
        two.set_receive_timeout(Some(Duration::from_millis(5))).unwrap();
        let error = two.recv(&mut [0; 4], &mut nothing()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        assert!(Connection::connect("uhmm-test-nobody").is_err());
    }
}
