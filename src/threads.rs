//! Parallel regions on candle's own persistent workers.
//!
//! A region is a list of tasks that own their outputs, so no two threads write the same memory and no code here is
//! unsafe. Threads take tasks from a shared cursor: a slow one takes fewer, one that arrives late finds nothing left to do.
//! Workers spin 25 000 times and then sleep (`CANDLE_BARRIER_POOL_SPIN_LIMIT`).
//!
//! The pool waits for every worker at the end of a region, even for one that finds nothing left to do. What that costs a
//! [`Policy`] weighs against what it brings: for the regions of a prompt's layer ([`Threads::schedule`]), for a token
//! ([`Threads::team`](crate::team)), and for any other region by itself.

mod policy;

use crate::tuning::{MIN_TASK_BYTES, TASKS_PER_THREAD};
use arrayvec::ArrayVec;
use candle_core::utils::barrier_pool;
pub(crate) use policy::{Policy, Sample};
use std::{
    cell::Cell,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

/// Tasks that a region can hold without allocating.
const INLINE_TASKS: usize = 128;

/// How many threads a model may use, the calling one included.
///
/// ```
/// use candle_sparse::Threads;
///
/// assert_eq!(Threads::new(1)?.count(), 1);
/// // None, or more than candle's pool has.
/// assert!(Threads::new(0).is_err() && Threads::new(100_000).is_err());
/// # Ok::<(), candle_core::Error>(())
/// ```
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
            let slot = slots.get(cursor.fetch_add(1, Ordering::Relaxed));
            // A slot is taken once, so its lock is never contended and cannot be poisoned by `f`.
            let task = slot.and_then(|slot| slot.lock().unwrap_or_else(PoisonError::into_inner).take());
            task.map(f).is_some()
        };
        match SCOPE.get() {
            _ if self.0 == 1 || slots.len() <= 1 => while work() {},
            Scope::Alone => while work() {},
            Scope::Together => self.region(slots.len(), &work),
            Scope::Unscheduled => self.schedule_region(|| {
                if self.alone() { while work() {} } else { self.region(slots.len(), &work) }
            }),
        }
    }

    /// Runs tasks by `work`, which says whether there was one, on all threads.
    fn region(self, tasks: usize, work: &(impl Fn() -> bool + Sync)) {
        let start = Instant::now();
        let own = Mutex::new((Duration::ZERO, 0));
        self.on_all(|index| {
            let done = std::iter::repeat_with(work).take_while(|more| *more).count();
            if index == 0 {
                *own.lock().unwrap_or_else(PoisonError::into_inner) = (start.elapsed(), done);
            }
        });
        let (own, done) = own.into_inner().unwrap_or_else(PoisonError::into_inner);
        add_alone_extra(self.alone_extra(own, start.elapsed(), done, tasks));
    }

    /// How many seconds longer the calling thread would have taken alone for a region of `tasks`, of which it ran `done` in
    /// `own`, while the region took `all`.
    fn alone_extra(self, own: Duration, all: Duration, done: usize, tasks: usize) -> f64 {
        let alone = match done {
            // The others are taken to have worked all the time.
            0 => all.as_secs_f64() * tasks.min(self.0 - 1) as f64,
            _ => own.as_secs_f64() * tasks as f64 / done as f64,
        };
        alone - all.as_secs_f64()
    }

    /// Runs `f`, whose regions run on all threads or on the calling one alone, as `policy` says, which learns from it.
    ///
    /// `work` is how much `f` does, in a unit of the policy: what one policy is used for should take as long per unit.
    pub(crate) fn schedule<R>(self, policy: &mut Policy, work: usize, f: impl FnOnce() -> R) -> R {
        if self.alone() {
            return f();
        }
        let (result, time, alone) = measured(policy.alone(), f);
        policy.note(Sample { work: work as f64, time, alone });
        result
    }

    /// Runs `f`, a region or a team's computation by itself, as all such of the process have proved faster.
    ///
    /// They differ in size: the unit of work is the time that the calling thread alone would have taken by its pace.
    pub(crate) fn schedule_region<R>(self, f: impl FnOnce() -> R) -> R {
        if self.alone() {
            return f();
        }
        let mut policy = *REGIONS.lock().unwrap_or_else(PoisonError::into_inner);
        let (result, time, alone) = measured(policy.alone(), f);
        policy.note(Sample { work: alone.as_secs_f64(), time, alone });
        // Of two regions at once the later one is remembered.
        *REGIONS.lock().unwrap_or_else(PoisonError::into_inner) = policy;
        result
    }

    /// Whether there is no other thread to share work with.
    pub(crate) fn alone(self) -> bool {
        self.0 == 1 || SCOPE.get() == Scope::Alone
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
                let result = catch_unwind(AssertUnwindSafe(|| Scope::Alone.enter(|| f(index))));
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

/// One for the process, as the pool is.
static REGIONS: Mutex<Policy> = Mutex::new(Policy::new());

thread_local! {
    static SCOPE: Cell<Scope> = const { Cell::new(Scope::Unscheduled) };
    /// How many seconds longer the regions so far would have taken on this thread alone.
    static ALONE_EXTRA: Cell<f64> = const { Cell::new(0.0) };
}

/// Tells what is being measured on this thread how many seconds longer a part of it would have taken alone.
pub(crate) fn add_alone_extra(seconds: f64) {
    ALONE_EXTRA.set(ALONE_EXTRA.get() + seconds);
}

/// Where a thread's regions run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scope {
    /// Each where such regions have proved faster.
    Unscheduled,
    /// On all threads, as what they are part of.
    Together,
    /// On the thread itself: inside a region, for the pool is taken, or as what they are part of.
    Alone,
}

impl Scope {
    fn enter<R>(self, f: impl FnOnce() -> R) -> R {
        let _restore = Restore(SCOPE.replace(self));
        f()
    }
}

/// Leaves a scope, also when what ran in it panics.
struct Restore(Scope);

impl Drop for Restore {
    fn drop(&mut self) {
        SCOPE.set(self.0);
    }
}

/// Runs `f` alone or together; its result, how long it took, and how long the calling thread alone would have taken.
fn measured<R>(alone: bool, f: impl FnOnce() -> R) -> (R, Duration, Duration) {
    let (start, outer) = (Instant::now(), ALONE_EXTRA.replace(0.0));
    let result = if alone { Scope::Alone } else { Scope::Together }.enter(f);
    let (time, extra) = (start.elapsed(), ALONE_EXTRA.replace(outer));
    let alone = Duration::try_from_secs_f64(time.as_secs_f64() + extra).unwrap_or(Duration::ZERO);
    (result, time, alone)
}

/// `len` cut into `n` ranges of nearly equal length, each (but the last) a multiple of `step`.
pub(crate) fn ranges(len: usize, n: usize, step: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let size = len.div_ceil(n.max(1)).next_multiple_of(step).max(1);
    (0..len).step_by(size).map(move |start| start..(start + size).min(len))
}

#[cfg(test)]
pub(crate) mod testing {
    use super::Threads;
    use std::{
        thread::sleep,
        time::{Duration, Instant},
    };

    /// Threads that share work: with one a test of what several do would say nothing.
    pub(crate) fn several() -> Threads {
        let threads = Threads::default();
        assert!(threads.count() > 1, "this test needs threads: set CANDLE_NUM_THREADS=4");
        threads
    }

    /// How many seconds longer what `f` ran would have taken on this thread alone.
    pub(crate) fn alone_extra_of(f: impl FnOnce()) -> f64 {
        super::ALONE_EXTRA.set(0.0);
        f();
        super::ALONE_EXTRA.get()
    }

    /// Waits for what another thread does, which on a busy machine may take some time.
    pub(crate) fn wait_until(what: &str, done: impl Fn() -> bool) {
        let start = Instant::now();
        while !done() {
            assert!(start.elapsed() < Duration::from_secs(30), "waited for {what} in vain");
            sleep(Duration::from_millis(1));
        }
    }
}

#[cfg(test)]
mod tests;
