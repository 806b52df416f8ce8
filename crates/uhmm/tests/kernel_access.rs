//! The kernel's own accesses to managed memory: system calls on pages that are on a device, and pages that
//! the kernel has pinned for input and output.

mod common;

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use common::{PAGE, Setup, WORDS, check, check_from, eventually, fill, part, settle, word};
use io_uring::{IoUring, opcode, types};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use uhmm::{Buffer, ByteSize, PageCount, Skip, Space};

with_engine!(Threads, threads_move, threads_fallback:
    a_pipe_reads_and_writes_pages_on_the_device,
    a_file_reads_and_writes_pages_on_the_device,
    many_calls_beside_migration,
    other_processes_read_pages_on_the_device,
    direct_input_beside_migration,
);
with_engine!(Signal, signal_move, signal_fallback: a_system_call_on_an_absent_page_fails_until_prefetched);

mod pinned {
    use super::common::{Setup, run};
    use uhmm::Engine;

    // Pins can be told from other pages by the kernel's refusal to move them, and not otherwise.
    #[test]
    fn signal_move() {
        let setup = Setup { engine: Engine::Signal, forced_fallback: false };
        run("pinned::signal_move", setup, super::pinned_pages_stay);
    }

    #[test]
    fn threads_move() {
        let setup = Setup { engine: Engine::Threads, forced_fallback: false };
        run("pinned::threads_move", setup, super::pinned_pages_stay);
    }
}

const PAGES: usize = 32;

fn away(space: &Space, buffer: &Buffer<u64>) {
    settle(space, buffer.range());
    assert_eq!(space.migrate(buffer.range()).unwrap().moved, buffer.range().pages());
}

fn bytes(buffer: &Buffer<u64>) -> &[u8] {
    // SAFETY: the same bytes.
    unsafe { std::slice::from_raw_parts(buffer.as_ptr().cast(), buffer.len() * 8) }
}

fn bytes_mut(buffer: &mut Buffer<u64>) -> &mut [u8] {
    // SAFETY: the same bytes, borrowed exclusively, all of whose values are numbers.
    unsafe { std::slice::from_raw_parts_mut(buffer.as_mut_ptr().cast(), buffer.len() * 8) }
}

/// A file without a name on a real file system.
fn file_with(contents: &[u8], flags: OFlags) -> OwnedFd {
    let fd = rustix::fs::open("/var/tmp", OFlags::TMPFILE | OFlags::RDWR | flags, Mode::RUSR | Mode::WUSR);
    let fd = fd.unwrap();
    let through = rustix::fs::open(format!("/proc/self/fd/{}", fd.as_raw_fd()), OFlags::RDWR, Mode::empty());
    File::from(through.unwrap()).write_all(contents).unwrap();
    fd
}

fn pattern(seed: u64, pages: usize) -> Vec<u8> {
    (0..pages * WORDS).flat_map(|at| word(seed, at).to_ne_bytes()).collect()
}

fn a_pipe_reads_and_writes_pages_on_the_device(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let mut source = space.map::<u64>(PAGES * WORDS).unwrap();
    let mut target = space.map::<u64>(PAGES * WORDS).unwrap();
    fill(&mut source, 1);
    fill(&mut target, 2);
    away(&space, &source);
    away(&space, &target);
    let (read, write) = rustix::pipe::pipe().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut rest = bytes(&source);
            while !rest.is_empty() {
                let written = rustix::io::write(&write, rest).unwrap();
                rest = &rest[written..];
            }
        });
        let mut rest = bytes_mut(&mut target);
        while !rest.is_empty() {
            // An odd length, so that calls begin and end inside pages.
            let len = rest.len().min(3 * PAGE + 123);
            let read = rustix::io::read(&read, &mut rest[..len]).unwrap();
            assert!(read > 0);
            rest = &mut rest[read..];
        }
    });
    check(&target, 1);
    check(&source, 1);
}

fn a_file_reads_and_writes_pages_on_the_device(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let file = file_with(&pattern(3, PAGES), OFlags::empty());
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    // Into pages that were never touched, and into pages on the device.
    for _ in 0..2 {
        assert_eq!(rustix::io::pread(&file, bytes_mut(&mut buffer), 0).unwrap(), PAGES * PAGE);
        check(&buffer, 3);
        away(&space, &buffer);
    }
    fill(&mut buffer, 4);
    away(&space, &buffer);
    assert_eq!(rustix::io::pwrite(&file, bytes(&buffer), 0).unwrap(), PAGES * PAGE);
    let mut plain = vec![0; PAGES * PAGE];
    assert_eq!(rustix::io::pread(&file, &mut plain, 0).unwrap(), PAGES * PAGE);
    assert!(plain == pattern(4, PAGES));
    // A call whose result the kernel writes across a border of pages.
    away(&space, &buffer);
    let stat = rustix::fs::fstat(&file).unwrap();
    let length = stat.st_size.to_ne_bytes();
    let at = PAGE - 4;
    bytes_mut(&mut buffer)[at..at + 8].copy_from_slice(&length);
    assert_eq!(bytes(&buffer)[at..at + 8], (PAGES as u64 * PAGE as u64).to_ne_bytes());
}

fn many_calls_beside_migration(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let contents = pattern(5, PAGES);
    let file = file_with(&contents, OFlags::empty());
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    let (range, over) = (buffer.range(), AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Acquire) {
                let _ = space.migrate(range).unwrap();
            }
        });
        for round in 0..200 {
            let at = (round * 977) % (PAGES * PAGE - 9000);
            let read = rustix::io::pread(&file, &mut bytes_mut(&mut buffer)[at..at + 9000], at as u64);
            if read != Ok(9000) {
                over.store(true, Ordering::Release);
            }
            assert_eq!(read, Ok(9000));
        }
        over.store(true, Ordering::Release);
    });
    let found = bytes(&buffer);
    for round in 0..200 {
        let at = (round * 977) % (PAGES * PAGE - 9000);
        assert!(found[at..at + 9000] == contents[at..at + 9000]);
    }
}

fn other_processes_read_pages_on_the_device(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    fill(&mut buffer, 6);
    away(&space, &buffer);
    // What a debugger does. (Reading `/proc/PID/mem` fails with an error: there the kernel does not wait.)
    let mut seen = vec![0_u8; PAGES * PAGE];
    let local = libc::iovec { iov_base: seen.as_mut_ptr().cast(), iov_len: seen.len() };
    let remote = libc::iovec { iov_base: buffer.as_ptr().cast_mut().cast(), iov_len: seen.len() };
    // SAFETY: the local side is as long as said; the remote one is checked by the kernel.
    let read =
        unsafe { libc::process_vm_readv(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0) };
    assert_eq!(read, (PAGES * PAGE) as isize);
    assert!(seen == pattern(6, PAGES));
}

fn direct_input_beside_migration(setup: Setup) {
    if setup.forced_fallback {
        common::skip(
            "direct_input_beside_migration",
            "without moving, pages in use by a device are not known",
        );
        return;
    }
    let space = setup.space(ByteSize::mib(4));
    let contents = [pattern(7, PAGES), pattern(8, PAGES)];
    let files = [&contents[0], &contents[1]].map(|contents| file_with(contents, OFlags::DIRECT));
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    let (range, over) = (buffer.range(), AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Acquire) {
                let _ = space.migrate(range).unwrap();
            }
        });
        for round in 0..100 {
            let read = rustix::io::pread(&files[round % 2], bytes_mut(&mut buffer), 0);
            let right = bytes(&buffer) == contents[round % 2];
            if read != Ok(PAGES * PAGE) || !right {
                over.store(true, Ordering::Release);
            }
            assert_eq!((read, right), (Ok(PAGES * PAGE), true), "round {round}");
        }
        over.store(true, Ordering::Release);
    });
}

fn pinned_pages_stay(setup: Setup) {
    const PINNED: usize = 8;
    let space = setup.space(ByteSize::mib(4));
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    fill(&mut buffer, 9);
    let Ok(mut ring) = IoUring::new(4) else {
        common::skip("pinned_pages_stay", "io_uring is not permitted");
        return;
    };
    let start = buffer.as_mut_ptr().wrapping_add(8 * WORDS);
    let vector = libc::iovec { iov_base: start.cast(), iov_len: PINNED * PAGE };
    // SAFETY: the buffer outlives the ring's use of it.
    unsafe { ring.submitter().register_buffers(&[vector]) }.unwrap();
    let done = space.migrate(buffer.range()).unwrap();
    assert_eq!(done.skipped.get(Skip::Busy), PINNED as u64, "{:?}", done.skipped);
    assert_eq!(done.moved, PageCount::new(PAGES - PINNED), "{:?}", done.skipped);
    assert_eq!(space.residency(part(buffer.range(), 8, PINNED)).resident, PageCount::new(PINNED));
    // The device writes into the pages, whatever became of their neighbours.
    let file = file_with(&pattern(10, PINNED), OFlags::DIRECT);
    for _ in 0..20 {
        let read =
            opcode::ReadFixed::new(types::Fd(file.as_raw_fd()), start.cast(), (PINNED * PAGE) as u32, 0);
        // SAFETY: the buffer and the file are there until the completion below.
        unsafe { ring.submission().push(&read.build()) }.unwrap();
        let _ = space.migrate(buffer.range()).unwrap();
        ring.submit_and_wait(1).unwrap();
        let result = ring.completion().next().unwrap().result();
        assert_eq!(result, (PINNED * PAGE) as i32);
        check(&buffer[8 * WORDS..(8 + PINNED) * WORDS], 10);
    }
    ring.submitter().unregister_buffers().unwrap();
    drop(ring);
    // The kernel lets go a moment later.
    let middle = part(buffer.range(), 8, PINNED);
    eventually(|| {
        let _ = space.migrate(middle).unwrap();
        space.residency(middle).device == PageCount::new(PINNED)
    });
    check(&buffer[8 * WORDS..(8 + PINNED) * WORDS], 10);
    check(&buffer[..8 * WORDS], 9);
    check_from(&buffer[(8 + PINNED) * WORDS..], 9, (8 + PINNED) * WORDS);
}

fn a_system_call_on_an_absent_page_fails_until_prefetched(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    fill(&mut buffer, 11);
    away(&space, &buffer);
    let file = file_with(&pattern(12, PAGES), OFlags::empty());
    let (_read, write) = rustix::pipe::pipe().unwrap();
    assert_eq!(rustix::io::write(write.as_fd(), &bytes(&buffer)[..PAGE]), Err(Errno::FAULT));
    assert_eq!(rustix::io::pread(&file, &mut bytes_mut(&mut buffer)[..PAGE], 0), Err(Errno::FAULT));
    assert_eq!(space.prefetch(buffer.range()).unwrap(), PageCount::new(PAGES));
    assert_eq!(rustix::io::write(write.as_fd(), &bytes(&buffer)[..PAGE]), Ok(PAGE));
    check(&buffer, 11);
    assert_eq!(rustix::io::pread(&file, bytes_mut(&mut buffer), 0), Ok(PAGES * PAGE));
    check(&buffer, 12);
}
