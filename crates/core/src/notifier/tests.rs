use alloc::sync::Arc;
use alloc::vec::Vec;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use uhmm_addr::{PageCount, VaRange, Vpn};

use super::{Change, Event, Mark, Notifiers, Owner, Subscriber, Subscription, WouldBlock};
use crate::sync::{AtomicU32, Park};

/// Sleeps a moment, whatever the word says.
struct Nap;

impl Park for Nap {
    fn park(&self, _word: &AtomicU32, _expected: u32) {
        thread::sleep(Duration::from_micros(50));
    }

    fn unpark(&self, _word: &AtomicU32) {}
}

/// A driver that passes over its own migrations, and writes down the others' changes.
struct Driver {
    me: Owner,
    seen: Mutex<Vec<(Event, VaRange)>>,
    marked: AtomicBool,
}

impl Driver {
    fn new(me: u64) -> Arc<Self> {
        Arc::new(Self { me: Owner(me), seen: Mutex::default(), marked: AtomicBool::new(false) })
    }

    fn take(&self) -> Vec<(Event, VaRange)> {
        core::mem::take(&mut self.seen.lock().unwrap())
    }
}

impl Subscriber for Driver {
    fn invalidate(&self, change: &Change, mark: Mark<'_>) -> Result<(), WouldBlock> {
        if change.event == Event::Migrate && change.owner == Some(self.me) {
            return Ok(());
        }
        let mut seen = if change.may_block {
            self.seen.lock().unwrap()
        } else {
            self.seen.try_lock().map_err(|_| WouldBlock)?
        };
        mark.set();
        self.marked.store(true, Ordering::Relaxed);
        seen.push((change.event, change.range));
        Ok(())
    }
}

fn pages(first: usize, pages: usize) -> VaRange {
    VaRange::of_pages(Vpn::new(first), PageCount::new(pages)).unwrap()
}

fn subscribe<'n>(notifiers: &'n Notifiers, range: VaRange, driver: &Arc<Driver>) -> Subscription<'n, Nap> {
    notifiers.subscribe(&Nap, range, driver.clone())
}

fn change(notifiers: &Notifiers, change: Change) -> Result<(), WouldBlock> {
    notifiers.begin(&Nap, &change).map(drop)
}

#[test]
fn who_overlaps_is_told_and_nobody_else() {
    let notifiers = Notifiers::new();
    let (low, high, wide) = (Driver::new(1), Driver::new(2), Driver::new(3));
    let subscriptions = [
        subscribe(&notifiers, pages(10, 10), &low),
        subscribe(&notifiers, pages(20, 10), &high),
        subscribe(&notifiers, pages(0, 100), &wide),
    ];
    change(&notifiers, Change::new(pages(15, 5), Event::Unmap)).unwrap();
    assert_eq!(low.take(), [(Event::Unmap, pages(15, 5))]);
    assert_eq!(high.take(), []);
    change(&notifiers, Change::new(pages(19, 2), Event::Protect)).unwrap();
    change(&notifiers, Change::new(pages(100, 5), Event::Clear)).unwrap();
    assert_eq!((low.take().len(), high.take().len(), wide.take().len()), (1, 1, 2));
    let [low_subscription, ..] = subscriptions;
    drop(low_subscription);
    notifiers.release(&Nap);
    assert_eq!(low.take(), []);
    assert_eq!(high.take()[0].0, Event::Release);
}

#[test]
fn a_ticket_is_stale_from_the_first_change_on() {
    let notifiers = Notifiers::new();
    let driver = Driver::new(1);
    let subscription = subscribe(&notifiers, pages(10, 10), &driver);
    let ticket = subscription.read_begin();
    change(&notifiers, Change::new(pages(20, 1), Event::Clear)).unwrap();
    assert!(!ticket.is_stale(), "other pages");
    change(&notifiers, Change::new(pages(12, 1), Event::Migrate).by(driver.me)).unwrap();
    assert!(!ticket.is_stale(), "his own doing");
    change(&notifiers, Change::new(pages(12, 1), Event::Migrate).by(Owner(9))).unwrap();
    assert!(ticket.is_stale());
    assert!(!subscription.read_begin().is_stale());
}

#[test]
fn whoever_collects_waits_for_changes_that_overlap_each_other() {
    let notifiers = Notifiers::new();
    let driver = Driver::new(1);
    let subscription = subscribe(&notifiers, pages(10, 10), &driver);
    let elsewhere = Change::new(pages(50, 1), Event::Clear);
    let here = Change::new(pages(10, 1), Event::Clear);
    let first = notifiers.begin(&Nap, &elsewhere).unwrap();
    assert!(!subscription.read_begin().is_stale(), "a change elsewhere is not waited for");
    let second = notifiers.begin(&Nap, &here).unwrap();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let ticket = subscription.read_begin();
            assert!(over.load(Ordering::Acquire), "both are over, as the last one ends both");
            ticket.is_stale()
        });
        drop(second);
        thread::sleep(Duration::from_millis(5));
        over.store(true, Ordering::Release);
        drop(first);
        assert!(!reader.join().unwrap());
    });
}

#[test]
fn who_cannot_wait_is_refused() {
    let notifiers = Notifiers::new();
    let (busy, free) = (Driver::new(1), Driver::new(2));
    let first = subscribe(&notifiers, pages(10, 1), &free);
    let second = subscribe(&notifiers, pages(11, 1), &busy);
    let tickets = [first.read_begin(), second.read_begin()];
    let held = busy.seen.lock().unwrap();
    let impatient = Change::new(pages(10, 2), Event::Clear).without_blocking();
    assert_eq!(change(&notifiers, impatient), Err(WouldBlock));
    assert_eq!(tickets.map(super::Ticket::is_stale), [true, false], "the first was told, for nothing");
    assert!(!first.read_begin().is_stale(), "and nothing is under way");
    drop(held);
    change(&notifiers, impatient).unwrap();
    assert_eq!(busy.take().len(), 1);
}

#[test]
fn subscriptions_come_and_go_beside_changes() {
    let notifiers = Notifiers::new();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    change(&notifiers, Change::new(pages(10, 2), Event::Clear)).unwrap();
                }
            });
        }
        for round in 0..2000 {
            let driver = Driver::new(round);
            let subscription = subscribe(&notifiers, pages(11, 1 + round as usize % 3), &driver);
            let ticket = subscription.read_begin();
            let _ = ticket.is_stale();
            drop(subscription);
            let told = driver.take().len();
            thread::yield_now();
            assert_eq!((driver.take().len(), told > 0), (0, driver.marked.load(Ordering::Relaxed)));
        }
        over.store(true, Ordering::Relaxed);
    });
}
