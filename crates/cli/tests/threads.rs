//! A Rust program with many threads, each of which writes, reads and checks patterns of its own and of others.
//!
//! The test binary is the program as well: it runs itself, with [`ROLE`] in the environment.

mod common;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;

use common::{Case, Numbers};

const ROLE: &str = "UHMM_TEST_THREADS";
const WORDS: usize = 512;
/// Pages of all threads together.
const PAGES: usize = 80 << 8;
const ROUNDS: u64 = 3;

fn pattern(page: usize, round: u64) -> u64 {
    (page as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ round
}

/// What `threads` threads find; every one checks what its neighbour wrote a round before.
fn work(threads: usize) {
    let each = PAGES / threads;
    let memory: Arc<Vec<AtomicU64>> =
        Arc::new((0..each * threads * WORDS).map(|_| AtomicU64::new(0)).collect());
    let barrier = Arc::new(Barrier::new(threads));
    let workers = (0..threads).map(|me| {
        let (memory, barrier) = (memory.clone(), barrier.clone());
        thread::spawn(move || {
            let mut numbers = Numbers(me as u64 + 1);
            let mut sum = 0_u64;
            for round in 1..=ROUNDS {
                for page in me * each..(me + 1) * each {
                    for word in (0..WORDS).step_by(64) {
                        memory[page * WORDS + word].store(pattern(page, round), Ordering::Relaxed);
                    }
                }
                // Memory of its own, which comes and goes.
                let own: Vec<u64> = (0..20_000).map(|n| n ^ round).collect();
                barrier.wait();
                let theirs = (me + 1) % threads;
                for page in (theirs * each..(theirs + 1) * each).chain(
                    numbers
                        .by_ref()
                        .take(each / 8)
                        .map(|number| number as usize % (each * threads))
                        .collect::<Vec<_>>(),
                ) {
                    for word in (0..WORDS).step_by(64) {
                        let found = memory[page * WORDS + word].load(Ordering::Relaxed);
                        assert_eq!(found, pattern(page, round), "page {page}, word {word}, round {round}");
                        sum = sum.rotate_left(1) ^ found;
                    }
                }
                sum = own.iter().fold(sum, |sum, word| sum.wrapping_add(*word));
                barrier.wait();
            }
            sum
        })
    });
    let sums: Vec<u64> =
        workers.collect::<Vec<_>>().into_iter().map(|worker| worker.join().unwrap()).collect();
    println!("{sums:x?}");
}

fn in_a_half_and_a_quarter(threads: &'static str, parts: &[u64]) {
    let this = PathBuf::from("/proc/self/exe").canonicalize().unwrap();
    Case::new("threads", &this).env(ROLE, threads).squeeze(parts);
}

fn main() {
    if let Ok(threads) = std::env::var(ROLE) {
        return work(threads.parse().unwrap());
    }
    in_a_half_and_a_quarter("6", &[2, 4]);
    // More threads than a handler takes in hand.
    in_a_half_and_a_quarter("100", &[2]);
    println!("threads: ok");
}
