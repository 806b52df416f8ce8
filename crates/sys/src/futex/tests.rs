use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::time::{Duration, Instant};

use super::*;

#[test]
fn a_wait_tells_why_it_ended() {
    let word = AtomicU32::new(1);
    assert_eq!(wait(&word, 0, None), Wait::Changed);
    assert_eq!(wait_shared(&word, 0, None), Wait::Changed);
    let start = Instant::now();
    while wait(&word, 1, Some(Duration::from_millis(5))) != Wait::TimedOut {}
    assert!(start.elapsed() >= Duration::from_millis(5));
    assert_eq!(wake(&word, u32::MAX), 0);
}

#[test]
fn a_wake_ends_a_wait() {
    for shared in [false, true] {
        let word = AtomicU32::new(0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while word.load(SeqCst) == 0 {
                    let _ = if shared { wait_shared(&word, 0, None) } else { wait(&word, 0, None) };
                }
            });
            std::thread::sleep(Duration::from_millis(2));
            word.store(1, SeqCst);
            if shared {
                wake_shared(&word, 1)
            } else {
                wake(&word, 1)
            };
        });
    }
}

#[test]
fn a_lock_lets_one_in_at_a_time() {
    let lock = Lock::new(0_u64);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..20_000 {
                    let mut value = lock.lock();
                    let read = *value;
                    core::hint::black_box(&value);
                    *value = read + 1;
                }
            });
        }
    });
    {
        let held = lock.lock();
        assert!(lock.try_lock().is_none());
        drop(held);
        assert!(lock.try_lock().is_some());
    }
    assert_eq!(lock.into_inner(), 160_000);
}
