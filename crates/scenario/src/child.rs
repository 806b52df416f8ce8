//! A child of the scenario's process, which touches memory when it is told to.
//!
//! What    [`Child`]: made by fork, told over one pipe, answers over another.
//! Ends    when it is told, or when the parent has gone and the pipe with it. A child that died answers nothing.

use std::ffi::c_int;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::FromRawFd;

use crate::device::Device;
use crate::memory::{Errno, Memory, checked};
use crate::operation::Pages;
use crate::touch;

/// The child, from its parent's side.
pub(crate) struct Child {
    process: libc::pid_t,
    orders: File,
    answers: File,
}

impl Child {
    /// Forks. The child has the memory as it is now, and not `devices`: they are closed when the parent closes them.
    pub(crate) fn fork(memory: &mut Memory, devices: &[&Device]) -> Result<Self, Errno> {
        let (orders, to_child) = pipe()?;
        let (answers, to_parent) = pipe()?;
        // SAFETY: the process has one thread that is ours; the child goes on with what is below, and ends.
        let process = unsafe { libc::fork() };
        checked(process)?;
        if process == 0 {
            drop((to_child, answers));
            devices.iter().for_each(|device| device.close());
            obey(memory, orders, to_parent);
            // SAFETY: nothing of the parent's is to be run down here.
            unsafe { libc::_exit(0) };
        }
        drop((orders, to_parent));
        let mut child = Self { process, orders: to_child, answers };
        // What it inherited is closed before anything else happens; a child that is gone by then answers nothing later.
        let _ = child.touch(Pages { first: 0, count: 0 }, None);
        Ok(child)
    }

    /// Has the child touch `pages`; what is written follows from `tag`. `None` if it did not answer.
    pub(crate) fn touch(&mut self, pages: Pages, tag: Option<u64>) -> Option<String> {
        let words = [pages.first, pages.count, u64::from(tag.is_some()), tag.unwrap_or(0)];
        let order: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        self.orders.write_all(&order).ok()?;
        let mut len = [0; 8];
        self.answers.read_exact(&mut len).ok()?;
        let mut text = vec![0; u64::from_ne_bytes(len) as usize];
        self.answers.read_exact(&mut text).ok()?;
        String::from_utf8(text).ok()
    }

    /// Ends it, and says how it ended.
    pub(crate) fn exit(self) -> String {
        let Self { process, orders, answers } = self;
        drop((orders, answers));
        ended(process)
    }
}

/// How a child ended, once it has.
pub(crate) fn ended(process: libc::pid_t) -> String {
    let mut status = 0;
    // SAFETY: a child of ours, and a place for the answer.
    if unsafe { libc::waitpid(process, &mut status, 0) } != process {
        return "is gone".into();
    }
    if libc::WIFSIGNALED(status) {
        format!("signal {}", libc::WTERMSIG(status))
    } else {
        format!("exit {}", libc::WEXITSTATUS(status))
    }
}

fn obey(memory: &mut Memory, mut orders: File, mut answers: File) {
    let mut order = [0; 32];
    while orders.read_exact(&mut order).is_ok() {
        let word = |n: usize| u64::from_ne_bytes(order.as_chunks::<8>().0[n]);
        let pages = Pages { first: word(0), count: word(1) };
        let text = touch(memory, pages, (word(2) != 0).then_some(word(3)));
        let answer = [&(text.len() as u64).to_ne_bytes(), text.as_bytes()].concat();
        if answers.write_all(&answer).is_err() {
            return;
        }
    }
}

/// The ends of a pipe, the one to read from first.
fn pipe() -> Result<(File, File), Errno> {
    let mut ends: [c_int; 2] = [0; 2];
    // SAFETY: a place for two descriptors.
    checked(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) })?;
    // SAFETY: both were just opened, and are nobody else's.
    Ok(unsafe { (File::from_raw_fd(ends[0]), File::from_raw_fd(ends[1])) })
}
