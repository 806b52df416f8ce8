use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use uhmm_addr::{PageCount, VaRange, Vpn};

use super::Relay;

fn range(first: usize, pages: usize) -> VaRange {
    VaRange::of_pages(Vpn::new(first), PageCount::new(pages)).unwrap()
}

fn nobody(range: VaRange) {
    panic!("nobody waits for {range:?}");
}

#[test]
fn an_empty_seat_takes_no_offer() {
    let relay = Relay::new();
    assert!(!relay.is_listening());
    assert!(!relay.offer(range(7, 1)));
    relay.settle(nobody);
}

#[test]
fn an_offer_that_is_not_taken_comes_back_and_empties_the_seat() {
    let relay = Relay::new();
    relay.listen(nobody);
    assert!(relay.is_listening());
    assert!(!relay.offer(range(7, 1)), "the listener does not look");
    assert!(!relay.is_listening());
    relay.listen(nobody);
    assert!(relay.is_listening(), "it came back");
}

#[test]
fn a_range_too_long_for_the_seat_is_not_offered() {
    let relay = Relay::new();
    relay.listen(nobody);
    assert!(!relay.offer(range(0x7_ffff_0000, 1024)));
    assert!(relay.is_listening());
}

#[test]
fn what_was_taken_is_settled_once_if_the_listener_does_not_come_back() {
    let relay = Relay::new();
    let settled = RefCell::new(Vec::new());
    let taken = AtomicBool::new(false);
    let wanted = range(0x7_ffff_ff00, 3);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !taken.load(Ordering::Acquire) {
                relay.listen(|found| {
                    assert_eq!(found, wanted);
                    taken.store(true, Ordering::Release);
                    // Its processor was taken away here: it is gone for as long as the test looks.
                    while taken.load(Ordering::Acquire) {
                        std::hint::spin_loop();
                    }
                });
                if taken.load(Ordering::Acquire) {
                    return;
                }
            }
        });
        while !relay.offer(wanted) {}
        while !taken.load(Ordering::Acquire) {
            std::hint::spin_loop();
        }
        relay.settle(|found| settled.borrow_mut().push(found));
        relay.settle(|found| settled.borrow_mut().push(found));
        assert_eq!(*settled.borrow(), [wanted]);
        taken.store(false, Ordering::Release);
        // The listener comes back to a seat that is no longer its own, and sits down again.
        while !relay.is_listening() {
            std::hint::spin_loop();
        }
        taken.store(true, Ordering::Release);
    });
}

#[test]
fn every_wake_up_is_done_by_somebody() {
    const OFFERS: usize = 50_000;
    let (relay, done) = (Relay::new(), AtomicBool::new(false));
    let woken: Vec<AtomicUsize> = (0..OFFERS).map(|_| AtomicUsize::new(0)).collect();
    let wake = |range: VaRange| {
        let _ = woken[range.first().get()].fetch_add(1, Ordering::Relaxed);
    };
    let left = std::thread::scope(|scope| {
        let listener = scope.spawn(|| {
            let mut rounds = 0_u32;
            while !done.load(Ordering::Acquire) {
                relay.listen(wake);
                rounds = rounds.wrapping_add(1);
                if rounds.is_multiple_of(1000) {
                    relay.leave(wake);
                }
            }
        });
        let mut relayed = 0;
        for n in 0..OFFERS {
            if relay.offer(range(n, 1)) {
                relayed += 1;
            } else {
                wake(range(n, 1));
                std::thread::yield_now();
            }
        }
        done.store(true, Ordering::Release);
        listener.join().unwrap();
        relay.settle(wake);
        relayed
    });
    assert!(woken.iter().all(|count| count.load(Ordering::Relaxed) >= 1), "{left} of them were relayed");
}
