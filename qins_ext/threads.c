/* Splitting work over threads.
 *
 * A call posts one job and works on it; pool threads that wake in time help. Parts are taken one by one, so a thread
 * that the system delays costs at most one part. A caller that finds the pool busy with another caller's job does all
 * parts itself.
 *
 * Threads of another runtime that spin while they wait (OpenMP's, under torch) would compete with the pool for cores.
 * If there is such a runtime, its own fork-join is used instead of the pool. */
#include <stdatomic.h>
#include <stddef.h>
#include <time.h>

#include "poll.h"
#include "qins.h"

#if defined(_WIN32)
#include <windows.h>
typedef SRWLOCK mutex;
typedef CONDITION_VARIABLE condition;
#define MUTEX_INIT SRWLOCK_INIT
#define CONDITION_INIT CONDITION_VARIABLE_INIT
static void lock(mutex *m) { AcquireSRWLockExclusive(m); }
static int try_lock(mutex *m) { return TryAcquireSRWLockExclusive(m) != 0; }
static void unlock(mutex *m) { ReleaseSRWLockExclusive(m); }
static void wait_for(condition *c, mutex *m) { SleepConditionVariableSRW(c, m, INFINITE, 0); }
static void wake_all(condition *c) { WakeAllConditionVariable(c); }
/* not timespec_get: the older one of Windows' C libraries lacks it */
static double seconds(void)
{
    LARGE_INTEGER now, per_second;
    QueryPerformanceCounter(&now);
    QueryPerformanceFrequency(&per_second);
    return (double)now.QuadPart / (double)per_second.QuadPart;
}
#define THREAD_RETURN DWORD WINAPI
static int start_thread(LPTHREAD_START_ROUTINE run)
{
    HANDLE h = CreateThread(NULL, 0, run, NULL, 0, NULL);
    if (h != NULL) {
        CloseHandle(h);
    }
    return h != NULL;
}
#else
#include <pthread.h>
typedef pthread_mutex_t mutex;
typedef pthread_cond_t condition;
#define MUTEX_INIT PTHREAD_MUTEX_INITIALIZER
#define CONDITION_INIT PTHREAD_COND_INITIALIZER
static void lock(mutex *m) { pthread_mutex_lock(m); }
static int try_lock(mutex *m) { return pthread_mutex_trylock(m) == 0; }
static void unlock(mutex *m) { pthread_mutex_unlock(m); }
static void wait_for(condition *c, mutex *m) { pthread_cond_wait(c, m); }
static void wake_all(condition *c) { pthread_cond_broadcast(c); }
static double seconds(void)
{
    struct timespec now;
    timespec_get(&now, TIME_UTC);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}
#define THREAD_RETURN void *
static int start_thread(void *(*run)(void *))
{
    pthread_t t;
    if (pthread_create(&t, NULL, run, NULL) != 0) {
        return 0;
    }
    pthread_detach(t);
    return 1;
}
#endif

/* About 50 microseconds: longer than the gaps between the layers of a model, shorter than a time slice. */
enum { SPINS = 1000, MAX_WORKERS = 255, PARTS_PER_THREAD = 4 };

/* Seconds of a piece, and between two polls. A poll may wait for Python's lock, for 0.005 s if another thread has it.
 */
#define PIECE 0.02
#define BETWEEN_POLLS 0.1

typedef struct {
    qins_poll poll; /* NULL: nobody asks */
    void *context;
    double asked; /* when */
    int stopped;
} asking;

static _Thread_local asking mine;

typedef struct {
    void (*task)(void *, size_t, size_t);
    void *context;
    size_t items, parts;
    atomic_size_t next; /* the first part, or with `by` the first item, that nobody has taken */
    asking *by;         /* of the thread that polls; NULL: parts, without polling */
    size_t grain, most; /* items of a piece */
    atomic_int stopped;
} job;

static mutex caller = MUTEX_INIT; /* held by the one call that uses the pool */
static mutex state = MUTEX_INIT;  /* guards the rest */
static condition posted = CONDITION_INIT, left = CONDITION_INIT;
static job *current;           /* NULL: nothing to join */
static atomic_int helping;     /* workers inside `current`; changes under `state`, read also while spinning */
static int workers;            /* threads that exist */
static atomic_uint generation; /* changes with every posted job, for spinning */
static _Atomic(qins_fork_join) fork_join;

static void ask(job *j, double now)
{
    const double since = now - j->by->asked;
    if (since < BETWEEN_POLLS && since >= 0.0) { /* negative: the clock was set */
        return;
    }
    asking before = *j->by;
    mine = (asking){.poll = NULL}; /* the poll may make calls of its own */
    before.stopped = before.poll(before.context) != 0;
    before.asked = seconds();
    mine = before;
    atomic_store(&j->stopped, mine.stopped);
}

/* Pieces grow or shrink until they take about PIECE. */
static void run_pieces(job *j)
{
    size_t piece = j->grain;
    while (!atomic_load(&j->stopped)) {
        const size_t begin = atomic_fetch_add(&j->next, piece);
        if (begin >= j->items) {
            return;
        }
        const double before = seconds();
        j->task(j->context, begin, piece < j->items - begin ? begin + piece : j->items);
        const double now = seconds(), took = now - before;
        if (took < PIECE / 2 && piece <= j->most / 2) {
            piece *= 2;
        } else if (took > 2 * PIECE && piece > 1) {
            piece /= 2;
        }
        if (j->by == &mine) {
            ask(j, now);
        }
    }
}

static void run_parts(job *j)
{
    if (j->by != NULL) {
        run_pieces(j);
        return;
    }
    size_t share = j->items / j->parts, extra = j->items % j->parts;
    for (;;) {
        size_t p = atomic_fetch_add(&j->next, 1);
        if (p >= j->parts) {
            return;
        }
        size_t begin = p * share + (p < extra ? p : extra);
        j->task(j->context, begin, begin + share + (p < extra));
    }
}

static THREAD_RETURN work(void *unused)
{
    (void)unused;
    unsigned seen = atomic_load(&generation) - 1; /* the job this thread was started for counts as new */
    for (;;) {
        for (int i = 0; i < SPINS && atomic_load(&generation) == seen; i++) {
            QINS_SPIN();
        }
        lock(&state);
        while (atomic_load(&generation) == seen) {
            wait_for(&posted, &state);
        }
        seen = atomic_load(&generation);
        job *j = current;
        atomic_fetch_add(&helping, j != NULL);
        unlock(&state);
        if (j != NULL) {
            run_parts(j);
            lock(&state);
            if (atomic_fetch_sub(&helping, 1) == 1) {
                wake_all(&left);
            }
            unlock(&state);
        }
    }
    return 0;
}

#if !defined(_WIN32)
/* Threads do not survive fork: the child starts its own, and leaves other runtimes' dead ones alone. */
static void after_fork_in_child(void)
{
    pthread_mutex_init(&caller, NULL);
    pthread_mutex_init(&state, NULL);
    pthread_cond_init(&posted, NULL);
    pthread_cond_init(&left, NULL);
    current = NULL;
    atomic_store(&helping, 0);
    workers = 0;
    atomic_store(&fork_join, NULL);
}

static pthread_once_t fork_once = PTHREAD_ONCE_INIT;
static void register_fork_handler(void) { pthread_atfork(NULL, NULL, after_fork_in_child); }
#define PREPARE_FOR_FORK() pthread_once(&fork_once, register_fork_handler)
#else
#define PREPARE_FOR_FORK() ((void)0)
#endif

static void run_on_pool(job *j, int threads)
{
    lock(&state);
    int wanted = threads - 1 < MAX_WORKERS ? threads - 1 : MAX_WORKERS;
    while (workers < wanted && start_thread(work)) {
        workers++;
    }
    current = j;
    atomic_fetch_add(&generation, 1);
    wake_all(&posted);
    unlock(&state);

    run_parts(j);

    lock(&state);
    current = NULL; /* workers that have not joined by now stay out */
    unlock(&state);
    for (int i = 0; i < SPINS && atomic_load(&helping) > 0; i++) { /* the last part is short; sleeping takes longer */
        QINS_SPIN();
    }
    lock(&state);
    while (atomic_load(&helping) > 0) {
        wait_for(&left, &state);
    }
    unlock(&state);
}

static void join_parts(void *j) { run_parts(j); }

void qins_set_poll(qins_poll poll, void *context)
{
    mine = (asking){.poll = poll, .context = context, .asked = poll != NULL ? seconds() : 0.0};
}

int qins_stopped(void) { return mine.stopped; }

void qins_set_fork_join(qins_fork_join parallel)
{
    PREPARE_FOR_FORK();
    atomic_store(&fork_join, parallel);
}

void qins_parallel(size_t items, size_t grain, int threads, void (*task)(void *, size_t, size_t), void *context)
{
    if (items == 0 || mine.stopped) {
        return;
    }
    grain = grain > 0 ? grain : 1;
    size_t most = items / grain;
    const int serial = threads <= 1 || most <= 1;
    if (serial && mine.poll == NULL) {
        task(context, 0, items);
        return;
    }
    threads = serial ? 1 : (size_t)threads > most ? (int)most : threads;
    job j = {.task = task, .context = context, .items = items};
    j.parts = (size_t)threads * PARTS_PER_THREAD < most ? (size_t)threads * PARTS_PER_THREAD : most;
    j.by = mine.poll != NULL ? &mine : NULL;
    j.grain = grain < items ? grain : items;
    j.most = serial ? items : items / j.parts;
    atomic_init(&j.next, 0);
    atomic_init(&j.stopped, 0);
    if (serial) {
        run_pieces(&j);
        return;
    }
    qins_fork_join other = atomic_load(&fork_join);
    if (other != NULL) {
        other(join_parts, &j, (unsigned)threads, 0);
        return;
    }
    PREPARE_FOR_FORK();
    if (!try_lock(&caller)) {
        run_parts(&j);
        return;
    }
    run_on_pool(&j, threads);
    unlock(&caller);
}
