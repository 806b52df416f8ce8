use std::sync::Barrier;
use std::sync::atomic::AtomicBool;

use super::*;

static TABLE: ThreadCpu = ThreadCpu::new();

fn tid() -> u32 {
    rustix::thread::gettid().as_raw_pid() as u32
}

#[test]
fn a_pinned_thread_is_found_where_it_is() {
    std::thread::spawn(|| {
        let before = allowed_cpus().unwrap();
        // SAFETY: the thread forgets itself below, and nothing manages its stack.
        let entered = unsafe { TABLE.register_current() };
        assert_eq!(entered, cpu_id_at(pointer()).is_some());
        for cpu in before.iter() {
            set_affinity(cpu).unwrap();
            assert_eq!(current_cpu(), cpu);
            assert_eq!(cpu_of_slow(tid()), Some(cpu));
            if entered {
                assert_eq!(TABLE.cpu_of(tid()), Some(cpu));
            }
            assert_eq!(allowed_cpus().unwrap().iter().collect::<Vec<_>>(), [cpu]);
        }
        set_affinity_all().unwrap();
        assert!(allowed_cpus().unwrap().count() >= before.count());
        set_affinity_to(&before).unwrap();
        assert_eq!(allowed_cpus().unwrap(), before);
        TABLE.forget(tid());
        assert_eq!(TABLE.cpu_of(tid()), None);
    })
    .join()
    .unwrap();
}

#[test]
fn threads_come_and_go_while_others_look() {
    let table: &ThreadCpu = Box::leak(Box::new(ThreadCpu::new()));
    let (stop, latest) = (AtomicBool::new(false), AtomicU32::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Relaxed) {
                let newest = latest.load(Relaxed);
                for tid in newest.saturating_sub(8)..newest + 8 {
                    assert!(table.cpu_of(tid).is_none_or(|cpu| cpu < 1024));
                }
            }
        });
        for _ in 0..50 {
            let barrier = Barrier::new(4);
            std::thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| {
                        // SAFETY: forgotten below, before the thread exits.
                        let entered = unsafe { table.register_current() };
                        latest.store(tid(), Relaxed);
                        barrier.wait();
                        assert_eq!(table.cpu_of(tid()).is_some(), entered);
                        table.forget(tid());
                    });
                }
            });
        }
        stop.store(true, Relaxed);
    });
    assert!(table.slots.iter().all(|slot| matches!(slot.tid.load(Relaxed), NOBODY | GONE)));
}

#[test]
fn a_table_for_a_forked_child_starts_empty() {
    let table: &ThreadCpu = Box::leak(Box::new(ThreadCpu::new()));
    // SAFETY: the entry is removed below; the thread lives until then.
    unsafe { table.register_current() };
    // SAFETY: no other thread knows this table.
    unsafe { table.forget_all() };
    assert_eq!(table.cpu_of(tid()), None);
}

#[test]
fn statistics_are_parsed_behind_any_name() {
    let rest = (3..=52).map(|n| n.to_string()).collect::<Vec<_>>().join(" ");
    assert_eq!(parse_stat(format!("77 (a) b) (c)) {rest}\n").as_bytes()), Some(39));
    assert_eq!(parse_stat(b"77 (a) S 1 2 3"), None);
    assert_eq!(parse_stat(b""), None);
    assert_eq!(cpu_of_slow(u32::MAX), None);
    let mut text = Text::<8>::default();
    text.push_number(0);
    text.push_number(4_294_967_295);
    assert_eq!(text.bytes(), b"04294967");
}

#[test]
fn a_thread_that_yields_to_all_has_the_idle_policy() {
    std::thread::spawn(|| {
        yield_to_all().unwrap();
        let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
        // Field 41 of all; the second one, the name, ends in the last parenthesis.
        let policy = stat.rsplit(')').next().unwrap().split_whitespace().nth(41 - 3);
        assert_eq!(policy, Some("5"), "SCHED_IDLE");
    })
    .join()
    .unwrap();
}
