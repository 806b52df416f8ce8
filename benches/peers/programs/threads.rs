//! Four threads write patterns, each to its part, and check what another wrote: in order, and here and there.

use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

const THREADS: usize = 4;
const EACH: usize = 10 << 10;
const WORDS: usize = 512;

fn pattern(page: usize, round: u64) -> u64 {
    (page as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ round
}

fn main() {
    let memory: Vec<AtomicU64> = (0..THREADS * EACH * WORDS).map(|_| AtomicU64::new(0)).collect();
    let barrier = Barrier::new(THREADS);
    let check = |page: usize, round: u64| {
        let found = memory[page * WORDS + page % WORDS].load(Ordering::Relaxed);
        assert_eq!(found, pattern(page, round), "page {page}, round {round}");
        found
    };
    let sums = thread::scope(|scope| {
        let work = |me: usize| {
            let (mut sum, mut at) = (0_u64, me as u64 + 1);
            for round in 1..=3 {
                for page in me * EACH..(me + 1) * EACH {
                    memory[page * WORDS + page % WORDS].store(pattern(page, round), Ordering::Relaxed);
                }
                barrier.wait();
                let theirs = (me + 1) % THREADS;
                for page in theirs * EACH..(theirs + 1) * EACH {
                    sum = sum.rotate_left(1) ^ check(page, round);
                }
                for _ in 0..EACH / 8 {
                    at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    sum = sum.rotate_left(1) ^ check((at >> 33) as usize % (THREADS * EACH), round);
                }
                barrier.wait();
            }
            sum
        };
        let workers: Vec<_> = (0..THREADS).map(|me| scope.spawn(move || work(me))).collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).collect::<Vec<_>>()
    });
    println!("{sums:x?}");
}
