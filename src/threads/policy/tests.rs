use super::*;

/// A machine with a simulated clock. Times in seconds.
#[derive(Clone, Copy)]
struct Machine {
    threads: f64,
    /// Workers that are always late, by `slice`.
    late: f64,
    slice: f64,
    /// How long a unit of work takes alone.
    unit: f64,
    /// How much longer it takes among others, who share the memory.
    shared: f64,
}

impl Machine {
    fn alone(self, work: f64) -> f64 {
        work * self.unit
    }

    /// Working and waiting of a shared computation: those that are in time do everything, and wait for the others.
    fn together(self, work: f64) -> [f64; 2] {
        let in_time = self.threads - self.late;
        [work * self.unit * self.shared / in_time, if self.late > 0.0 { self.slice } else { 0.0 }]
    }

    /// Runs one computation as `policy` says; how long it took.
    fn run(self, policy: &mut Policy, work: f64) -> f64 {
        let (time, alone) = if policy.alone() {
            (self.alone(work), self.alone(work))
        } else {
            let [own, wait] = self.together(work);
            (own + wait, own * (self.threads - self.late))
        };
        let [time, alone] = [time, alone].map(Duration::from_secs_f64);
        policy.note(Sample { work, time, alone });
        time.as_secs_f64()
    }

    /// What both ways take: alone, and together.
    fn both(self, work: f64) -> [f64; 2] {
        [self.alone(work), self.together(work).iter().sum()]
    }

    /// Runs computations of all sizes; how long they took as `policy` says, and in the better of both ways.
    fn run_all(self, policy: &mut Policy, n: usize) -> [f64; 2] {
        let (mut took, mut both) = (0.0, [0.0; 2]);
        for i in 0..n {
            took += self.run(policy, work(i));
            both.iter_mut().zip(self.both(work(i))).for_each(|(sum, time)| *sum += time);
        }
        [took, both[0].min(both[1])]
    }
}

/// All machines: 2 to 64 threads, 0 to 2 late ones, slices that are short and long beside a computation.
fn machines() -> impl Iterator<Item = Machine> {
    let late = |threads: f64| [0.0, 1.0, 2.0].into_iter().filter(move |l| *l < threads);
    let shapes = [2.0, 16.0, 64.0].into_iter().flat_map(move |n| late(n).map(move |l| [n, l]));
    shapes.flat_map(|[threads, late]| {
        [1e-4, 1e-3, 4e-3, 0.1].into_iter().flat_map(move |slice| {
            [1e-4, 1e-3, 1e-2, 0.3].map(|unit| Machine { threads, late, slice, unit, shared: 1.0 })
        })
    })
}

/// Works of different sizes, in an order without a period.
fn work(i: usize) -> f64 {
    [1.0, 2.0, 0.5, 1.5, 3.0][i * i * 7 % 5]
}

#[test]
fn little_is_lost_beside_the_better_way() {
    for machine in machines() {
        let Machine { threads, late, slice, unit, .. } = machine;
        let about = format!("{threads} threads, {late} late by {slice}, {unit} per unit");
        let mut policy = Policy::new();
        let [took, best] = machine.run_all(&mut policy, 60);
        // What is paid once, before anything is known.
        let paid = took - best;
        let worst = 1.5 * machine.together(2.0).iter().sum::<f64>();
        assert!(paid <= 8.0 * worst, "{about}: the first trials lost {paid}");
        let [took, best] = machine.run_all(&mut policy, 4000);
        assert!(took <= best * (1.0 + 1.0 / LEAST_STAY) + worst, "{about}: {took} for {best}");
    }
}

#[test]
fn one_thread_of_many_is_not_tried_where_it_must_be_slow() {
    for machine in machines() {
        let [own, wait] = machine.together(1.0);
        if own * (machine.threads - machine.late) < 1.6 * (own + wait) {
            continue;
        }
        let mut policy = Policy::new();
        for i in 0..1000 {
            machine.run(&mut policy, work(i));
            assert!(!policy.alone());
        }
    }
}

#[test]
fn threads_that_slow_each_other_down_are_measured_and_not_guessed() {
    // By the pace of the calling thread among others three gain from each other, one of them being late; alone it is faster.
    for shared in [1.2, 1.4, 1.6] {
        let machine = Machine { threads: 3.0, late: 1.0, slice: 0.45e-3, unit: 1e-3, shared };
        let [own, wait] = machine.together(1.0);
        assert!(2.0 * own > own + wait && own + wait > machine.alone(1.0));
        let mut policy = Policy::new();
        let [took, best] = machine.run_all(&mut policy, 4000);
        assert!(took < 1.07 * best, "{shared}: {took} for {best}");
    }
}

#[test]
fn a_change_of_the_load_is_noticed_both_ways() {
    let free = Machine { threads: 2.0, late: 0.0, slice: 4e-3, unit: 1e-2, shared: 1.0 };
    let busy = Machine { late: 1.0, ..free };
    let mut policy = Policy::new();
    for machine in [free, busy, free, busy, free] {
        let [took, best] = machine.run_all(&mut policy, 1500);
        assert!(took < 1.1 * best, "{took} for {best}");
    }
}

#[test]
fn one_late_thread_is_no_reason() {
    let free = Machine { threads: 2.0, late: 0.0, slice: 4e-3, unit: 1e-2, shared: 1.0 };
    let busy = Machine { late: 1.0, ..free };
    let mut policy = Policy::new();
    for i in 0..2000 {
        let machine = if i % 40 == 17 { busy } else { free };
        machine.run(&mut policy, 1.0);
        assert!(!policy.alone(), "computation {i}");
    }
}

#[test]
fn where_half_a_core_still_helps_the_threads_stay_together() {
    // Every third computation is late, by a third of it.
    let free = Machine { threads: 2.0, late: 0.0, slice: 3e-3, unit: 1e-2, shared: 1.0 };
    let busy = Machine { late: 1.0, unit: 1e-2, ..free };
    let (mut policy, mut alone) = (Policy::new(), 0);
    for i in 0..4000 {
        alone += usize::from(policy.alone());
        if i % 3 == 0 { busy } else { free }.run(&mut policy, 1.0);
    }
    assert!(alone < 400, "{alone} of 4000 computations alone");
}

#[test]
fn times_of_other_work_are_forgotten() {
    let busy = Machine { threads: 2.0, late: 1.0, slice: 4e-3, unit: 1e-3, shared: 1.0 };
    let mut policy = Policy::new();
    busy.run_all(&mut policy, 200);
    assert!(policy.alone());
    policy.forget_times();
    assert!(policy.alone(), "the neighbours are still there");
    let slower = Machine { unit: 20e-3, ..busy };
    let [took, best] = slower.run_all(&mut policy, 1000);
    assert!(took < 1.1 * best, "{took} for {best}");
}
