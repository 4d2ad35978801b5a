//! Parallel regions on candle's own persistent workers.
//!
//! A region is a list of tasks that own their outputs, so no two threads write the same memory and no code here is
//! unsafe. Workers take tasks from a shared cursor: one that arrives late finds nothing left to do. Workers spin
//! 25 000 times and then sleep (`CANDLE_BARRIER_POOL_SPIN_LIMIT`).

use arrayvec::ArrayVec;
use candle_core::utils::barrier_pool;
use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering},
};
use std::{
    cell::Cell,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    time::Instant,
};

/// Tasks that a region can hold without allocating.
const INLINE_TASKS: usize = 128;
/// Less work than this many bytes is not worth waking a worker.
const MIN_TASK_BYTES: usize = 16 * 1024;
/// Tasks per thread: a late worker then costs at most an eighth of a region.
const TASKS_PER_THREAD: usize = 8;

/// How many threads a model may use, the calling one included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Threads(usize);

impl Default for Threads {
    /// All of candle's pool: `CANDLE_NUM_THREADS`, else `RAYON_NUM_THREADS`, else one per physical core.
    fn default() -> Self {
        Self(barrier_pool().n_workers() + 1)
    }
}

impl Threads {
    /// At most `n` threads of candle's pool.
    ///
    /// # Errors
    /// `n` is 0 or more than the pool has; set `CANDLE_NUM_THREADS` for a larger pool.
    pub fn new(n: usize) -> candle_core::Result<Self> {
        let Self(max) = Self::default();
        if n == 0 || n > max {
            candle_core::bail!(
                "threads: {n} asked for, candle's pool has 1 to {max} (CANDLE_NUM_THREADS sets it)"
            );
        }
        Ok(Self(n))
    }

    /// The number of threads.
    #[must_use]
    pub fn count(self) -> usize {
        self.0
    }

    /// Into how many tasks work on `units` things of `bytes` in total is best cut.
    #[must_use]
    pub(crate) fn tasks(self, units: usize, bytes: usize) -> usize {
        if self.0 == 1 {
            return 1;
        }
        (bytes / MIN_TASK_BYTES).clamp(1, self.most_tasks()).min(units.max(1))
    }

    /// The most tasks that [`Self::tasks`] ever says.
    #[must_use]
    pub(crate) fn most_tasks(self) -> usize {
        (self.0 * TASKS_PER_THREAD).min(INLINE_TASKS)
    }

    /// Runs `f` on every task, on as many threads as allowed; returns when all are done.
    ///
    /// Up to 128 tasks cost no allocation.
    pub(crate) fn for_each<T: Send>(self, tasks: impl Iterator<Item = T>, f: impl Fn(T) + Sync) {
        let mut slots = ArrayVec::<Mutex<Option<T>>, INLINE_TASKS>::new();
        let mut tasks = tasks;
        while let Some(task) = tasks.next() {
            if let Err(full) = slots.try_push(Mutex::new(Some(task))) {
                let many: Vec<_> = slots
                    .into_iter()
                    .chain([full.element()])
                    .chain(tasks.map(|t| Mutex::new(Some(t))))
                    .collect();
                return self.run(&many, &f);
            }
        }
        self.run(&slots, &f);
    }

    fn run<T: Send>(self, slots: &[Mutex<Option<T>>], f: &(impl Fn(T) + Sync)) {
        let cursor = AtomicUsize::new(0);
        let work = || {
            while let Some(slot) = slots.get(cursor.fetch_add(1, Ordering::Relaxed)) {
                // A slot is taken once, so its lock is never contended and cannot be poisoned by `f`.
                let task = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
                if let Some(task) = task {
                    f(task);
                }
            }
        };
        if self.alone() || slots.len() <= 1 || LATENESS.alone() {
            return work();
        }
        let start = Instant::now();
        let own_ns = AtomicU64::new(0);
        self.on_all(|index| {
            work();
            if index == 0 {
                own_ns.store(nanoseconds(start), Ordering::Relaxed);
            }
        });
        LATENESS.note(own_ns.load(Ordering::Relaxed), nanoseconds(start));
    }

    /// Whether there is no other thread to share work with.
    pub(crate) fn alone(self) -> bool {
        self.0 == 1 || IN_REGION.get()
    }

    /// Calls `f(index)` on every thread, `f(0)` on the calling one; returns when all are done, resuming a panic.
    pub(crate) fn on_all(self, f: impl Fn(usize) + Sync) {
        let pool = barrier_pool();
        // The caller is the pool's last thread; with fewer threads allowed than there are, the surplus returns at once.
        let caller = pool.n_workers();
        // A panic that left `execute` on this thread would poison the pool for the whole process.
        let panicked = Mutex::new(None);
        pool.execute(|tid| {
            let index = if tid == caller { 0 } else { tid + 1 };
            if index < self.0 {
                IN_REGION.set(true);
                let result = catch_unwind(AssertUnwindSafe(|| f(index)));
                IN_REGION.set(false);
                if let Err(panic) = result {
                    *panicked.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
                }
            }
        });
        if let Some(panic) = panicked.into_inner().unwrap_or_else(PoisonError::into_inner) {
            resume_unwind(panic);
        }
    }
}

fn nanoseconds(since: Instant) -> u64 {
    since.elapsed().as_nanos() as u64
}

/// What to do about workers that do not come because their core is busy with something else.
///
/// The pool waits for every worker at the end of a region, even for one that finds nothing left to do. A worker that has
/// lost its core comes a time slice later, milliseconds where a region takes microseconds; without a remedy a single busy
/// neighbour makes decode ten times slower. So after a late worker the caller runs the next regions alone, more of them
/// each time it happens again in a row, and then tries once more.
struct Lateness {
    /// Regions still to be run alone.
    alone: AtomicU32,
    /// How many the last late worker cost.
    penalty: AtomicU32,
}

/// One for the process, as the pool is.
static LATENESS: Lateness = Lateness::new();

impl Lateness {
    /// A wait shorter than this is what waking a sleeping worker may take.
    const GRACE_NS: u64 = 200_000;
    const SHORTEST: u32 = 16;
    const LONGEST: u32 = 2048;

    const fn new() -> Self {
        Self { alone: AtomicU32::new(0), penalty: AtomicU32::new(0) }
    }

    /// Whether the next region is to be run alone; counts it.
    fn alone(&self) -> bool {
        let left = self.alone.load(Ordering::Relaxed);
        if left > 0 {
            // Two callers may both take the last one; then one region more runs alone.
            self.alone.store(left - 1, Ordering::Relaxed);
        }
        left > 0
    }

    /// `own_ns`: until the caller had no work left; `all_ns`: until the last worker was done.
    fn note(&self, own_ns: u64, all_ns: u64) {
        // A worker's last task may well take as long as all that the caller did.
        let late = all_ns - own_ns.min(all_ns) > Self::GRACE_NS.max(2 * own_ns);
        let penalty = self.penalty.load(Ordering::Relaxed);
        let next = if late { (2 * penalty).clamp(Self::SHORTEST, Self::LONGEST) } else { penalty / 2 };
        self.penalty.store(next, Ordering::Relaxed);
        if late {
            self.alone.store(next, Ordering::Relaxed);
        }
    }
}

thread_local! {
    /// A region inside a region runs on its own thread: the pool is taken.
    static IN_REGION: Cell<bool> = const { Cell::new(false) };
}

/// `len` cut into `n` ranges of nearly equal length, each (but the last) a multiple of `step`.
pub(crate) fn ranges(len: usize, n: usize, step: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let size = len.div_ceil(n.max(1)).next_multiple_of(step).max(1);
    (0..len).step_by(size).map(move |start| start..(start + size).min(len))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_however_many_there_are() {
        for n in [0, 1, 2, INLINE_TASKS, INLINE_TASKS + 1, 1000] {
            let mut out = vec![0_u32; n];
            Threads::default().for_each(out.iter_mut().enumerate(), |(i, v)| *v += i as u32 + 1);
            assert!(out.iter().enumerate().all(|(i, &v)| v == i as u32 + 1), "{n} tasks");
        }
    }

    #[test]
    fn nested_regions_and_panics_leave_the_pool_usable() {
        let threads = Threads::default();
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
    fn late_workers_are_left_alone_for_longer_each_time() {
        let lateness = Lateness::new();
        let regions = || (0..).take_while(|_| lateness.alone()).count();
        for expected in [16, 32, 64] {
            lateness.note(1_000, 3_000_000);
            assert_eq!(regions(), expected);
        }
        for _ in 0..20 {
            lateness.note(1_000, 50_000);
        }
        lateness.note(5_000_000, 9_000_000);
        assert_eq!(regions(), 0, "neither waking nor a long last task is lateness");
        lateness.note(1_000, 3_000_000);
        assert_eq!(regions(), 16, "good regions were forgiven");
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
}
