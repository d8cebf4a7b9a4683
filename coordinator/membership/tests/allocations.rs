//! Where nothing is exported, spans cost no memory: not at a request's start, nor at its end.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::{Duration, Instant};

use baton_membership::traces::{Parent, Span, exporting};

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

/// Counts each thread's allocations.
struct Counting;

// SAFETY: all is left to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, old: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(old, layout) }
    }
}

#[global_allocator]
static GLOBAL: Counting = Counting;

#[test]
fn without_an_exporter_a_span_allocates_nothing() {
    assert!(!exporting());
    let before = ALLOCATIONS.get();
    let client = Parent::of_headers(|_| None);
    let mut request = client.server(String::new());
    request.set("gen_ai.request.n", 1_i64);
    let mut call = request.as_parent().rpc_client("baton.v1.Worker/Generate", "http://worker:1");
    let message = call.as_parent().request(7_u64);
    let mut serving =
        Parent::of_metadata(message.metadata()).rpc_server("baton.v1.Worker/Generate");
    serving.set_time("gen_ai.latency.time_in_queue", Duration::from_millis(3));
    let prompt = serving.as_parent().span_since("prefill", Instant::now());
    call.fail("unavailable");
    let exports = [&request, &call, &serving, &prompt].map(Span::exports);
    drop((request, call, serving, prompt));
    assert_eq!(ALLOCATIONS.get() - before, 0);
    assert_eq!(exports, [false; 4]);
    // The allocations of a thread are counted, that is.
    drop(std::hint::black_box(vec![1]));
    assert_eq!(ALLOCATIONS.get() - before, 1);
}
