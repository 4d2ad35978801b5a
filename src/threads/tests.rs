use super::{
    testing::{several, wait_until},
    *,
};
use std::thread::{current, sleep};

#[test]
fn every_task_runs_once_however_many_there_are() {
    for n in [0, 1, 2, INLINE_TASKS, INLINE_TASKS + 1, 1000] {
        let mut out = vec![0_u32; n];
        several().for_each(out.iter_mut().enumerate(), |(i, v)| *v += i as u32 + 1);
        assert!(out.iter().enumerate().all(|(i, &v)| v == i as u32 + 1), "{n} tasks");
    }
}

#[test]
fn nested_regions_and_panics_leave_the_pool_usable() {
    let threads = several();
    let count = AtomicUsize::new(0);
    threads.for_each(0..4, |_| {
        threads.for_each(0..4, |_| {
            count.fetch_add(1, Ordering::Relaxed);
        });
    });
    assert_eq!(count.load(Ordering::Relaxed), 16);
    let panicked = catch_unwind(|| threads.for_each(0..4, |i| assert!(i != 2, "on purpose")));
    assert!(panicked.is_err());
    threads.for_each(0..4, |_| {
        count.fetch_add(1, Ordering::Relaxed);
    });
    assert_eq!(count.load(Ordering::Relaxed), 20);
}

#[test]
fn a_slow_thread_takes_fewer_tasks_and_the_end_waits_for_one_of_them() {
    const TASKS: usize = 64;
    let (threads, caller) = (several(), current().id());
    let [by_caller, by_others] = [0, 0].map(AtomicUsize::new);
    let begun = || by_caller.load(Ordering::Relaxed) + by_others.load(Ordering::Relaxed);
    threads.for_each(0..TASKS, |_| {
        if current().id() == caller {
            // Until another thread has a task, so that there is a slow one at all.
            wait_until("another thread", || by_others.load(Ordering::Relaxed) > 0);
            by_caller.fetch_add(1, Ordering::Relaxed);
        } else {
            // As slow as can be: its first task takes as long as all that others can do.
            by_others.fetch_add(1, Ordering::Relaxed);
            wait_until("the others' tasks", || begun() == TASKS);
        }
    });
    assert!(by_others.into_inner() < threads.count(), "a slow thread had more than one task");
}

/// Which threads run the tasks of a region that `policy` schedules: whether another one than this took part.
fn others_help(policy: &mut Policy, work: usize, task: Duration) -> bool {
    let (caller, others) = (current().id(), AtomicUsize::new(0));
    several().schedule(policy, work, || {
        several().for_each(0..8, |_| {
            sleep(task);
            others.fetch_add(usize::from(current().id() != caller), Ordering::Relaxed);
        });
    });
    others.into_inner() > 0
}

#[test]
fn a_policy_learns_from_regions_and_is_followed() {
    let task = Duration::from_millis(3);
    let mut policy = Policy::new();
    assert!(others_help(&mut policy, 1, task));
    assert!(!policy.alone());
    // Such as no region has taken: alone is faster, whatever is measured from now on.
    let late = Sample { work: 1.0, time: Duration::from_secs(1), alone: Duration::from_millis(1) };
    while !policy.alone() {
        policy.note(late);
    }
    assert!(!others_help(&mut policy, 1, task), "the policy says alone");
    assert!(!several().alone(), "which ends with what was scheduled");
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        several().schedule(&mut policy, 1, || panic!("on purpose"));
    }));
    assert!(panicked.is_err() && !several().alone(), "a panic leaves this thread as it was");
}

#[test]
fn the_calling_threads_pace_says_how_long_it_would_have_taken_alone() {
    let four = Threads(4);
    let [ms10, ms12] = [10, 12].map(Duration::from_millis);
    let extra = |own, all, done| (four.alone_extra(own, all, done, 32) * 1000.0).round();
    assert_eq!(extra(ms10, ms10, 8), 30.0, "four as fast as one another");
    assert_eq!(extra(ms10, ms12, 8), 28.0, "and a wait of 2 ms");
    assert_eq!(extra(ms10, ms12, 32), -2.0, "only a wait");
    assert_eq!(extra(Duration::ZERO, ms10, 0), 20.0, "three did it, it came too late");
}

#[test]
fn thread_numbers_are_checked() {
    assert!(Threads::new(0).is_err());
    let err = Threads::new(100_000).unwrap_err().to_string();
    assert!(err.contains("CANDLE_NUM_THREADS"), "{err}");
    assert_eq!(Threads::new(1).unwrap().count(), 1);
}

#[test]
fn ranges_cover_everything_in_steps() {
    for (len, n) in [(0, 3), (1, 3), (10, 3), (64, 16), (101, 7)] {
        let all: Vec<_> = ranges(len, n, 4).collect();
        assert!(all.len() <= n);
        assert_eq!(all.iter().map(ExactSizeIterator::len).sum::<usize>(), len);
        assert!(all.iter().rev().skip(1).all(|r| r.len() % 4 == 0));
    }
}
