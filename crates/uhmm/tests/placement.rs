//! Where the first handler runs: with a faulter that is bound to a processor, and wherever it likes otherwise.

mod common;

use std::fs;
use std::path::PathBuf;

use common::{Setup, WORDS, turn};
use uhmm::yardstick::on_one_processor;
use uhmm::{Buffer, ByteSize, Space};

const PAGES: usize = 256;

with_engine!(Threads, threads_move, threads_fallback:
    the_handler_goes_where_a_bound_faulter_is_and_leaves_with_it,
);

/// The processors that the first handler of the only space may run on, as the kernel lists them.
fn place() -> String {
    let allowed = |status: String| {
        let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
        Some(line.trim().to_owned())
    };
    let tasks = fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
    let named = |path: &PathBuf| {
        fs::read_to_string(path.join("comm")).is_ok_and(|name| name.trim_end() == "uhmm-handler")
    };
    let handler = tasks.filter(named).find_map(|task| fs::read_to_string(task.join("status")).ok());
    handler.and_then(allowed).expect("a space has a handler")
}

/// Sends all pages away and touches them, none beside the one before, so that each is a fault.
fn touch(space: &Space, buffer: &Buffer<u64>) {
    let _ = space.migrate(buffer.range()).unwrap();
    for page in (0..PAGES).map(|n| n * 97 % PAGES) {
        assert_eq!(buffer[page * WORDS], page as u64);
    }
}

fn the_handler_goes_where_a_bound_faulter_is_and_leaves_with_it(setup: Setup) {
    let _turn = turn();
    let space = setup.space(ByteSize::mib(4));
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    buffer.advise_no_huge().unwrap();
    for page in 0..PAGES {
        buffer[page * WORDS] = page as u64;
    }
    let everywhere = place();
    touch(&space, &buffer);
    assert_eq!(place(), everywhere, "a faulter that may run anywhere is not followed");
    on_one_processor(|cpu| {
        touch(&space, &buffer);
        assert_eq!(place(), cpu.to_string());
    })
    .unwrap();
    touch(&space, &buffer);
    assert_eq!(place(), everywhere);
}
