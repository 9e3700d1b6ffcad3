/* A small crew of threads that wait for work, for one call at a time. What is too small for them, or comes while they
   are at another thread's call, the caller does alone. */
#ifndef NESTLING_THREADS_H
#define NESTLING_THREADS_H
#include <pthread.h>
#include <stdint.h>

namespace nk {

typedef void (*Work)(void *closure, int32_t task);

enum { CREW_MAX = 64, SPINS = 2000 };

struct Crew {
  pthread_mutex_t taken; /* by the call that has the crew, from its beginning to its end */
  pthread_mutex_t lock;
  pthread_cond_t called, idle;
  int32_t wanted, started; /* threads in all (the caller is one of them), and those that were started */
  uint32_t call;           /* number of the latest call; threads spin on it, then sleep */
  int32_t open, active;    /* may one still join, and how many have joined and are not through */
  Work work;
  void *closure;
  int32_t tasks, next;
};

static Crew crew = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER,
                    PTHREAD_COND_INITIALIZER, 1, 1, 0, 0, 0, 0, 0, 0, 0};

INLINE void rest() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

static void take_tasks() {
  for (;;) {
    int32_t task = __atomic_fetch_add(&crew.next, 1, __ATOMIC_RELAXED);
    if (task >= crew.tasks) return;
    crew.work(crew.closure, task);
  }
}

static void *serve(void *number) {
  int32_t self = (int32_t)(intptr_t)number;
  uint32_t seen = 0;
  for (;;) {
    for (int i = 0; i < SPINS && __atomic_load_n(&crew.call, __ATOMIC_RELAXED) == seen; i++) rest();
    pthread_mutex_lock(&crew.lock);
    while (crew.call == seen) pthread_cond_wait(&crew.called, &crew.lock);
    seen = crew.call;
    int join = crew.open && self < crew.wanted;
    __atomic_fetch_add(&crew.active, join, __ATOMIC_RELAXED); /* also read without the lock */
    pthread_mutex_unlock(&crew.lock);
    if (!join) continue;
    take_tasks();
    pthread_mutex_lock(&crew.lock);
    if (__atomic_sub_fetch(&crew.active, 1, __ATOMIC_RELAXED) == 0) pthread_cond_signal(&crew.idle);
    pthread_mutex_unlock(&crew.lock);
  }
  return 0;
}

/* After a fork only the caller is there. */
static void forget() {
  pthread_mutex_init(&crew.taken, 0);
  pthread_mutex_init(&crew.lock, 0);
  pthread_cond_init(&crew.called, 0);
  pthread_cond_init(&crew.idle, 0);
  crew.started = 1;
  crew.open = crew.active = 0;
}

static void hire() {
  if (crew.call == 0 && crew.started == 1) pthread_atfork(0, 0, forget);
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  pthread_attr_setstacksize(&attributes, 1 << 18);
  while (crew.started < crew.wanted) {
    pthread_t thread;
    if (pthread_create(&thread, &attributes, serve, (void *)(intptr_t)crew.started)) break; /* fewer will do it too */
    crew.started++;
  }
  pthread_attr_destroy(&attributes);
}

/* Call f(task) for every task below `tasks`, in any order and on any thread of the crew; returns when all are done. */
template <class F> static void parallel(int32_t tasks, F &f) {
  if (crew.wanted < 2 || tasks < 2 || pthread_mutex_trylock(&crew.taken)) {
    for (int32_t task = 0; task < tasks; task++) f(task);
    return;
  }
  pthread_mutex_lock(&crew.lock);
  if (crew.started < crew.wanted) hire();
  crew.work = [](void *closure, int32_t task) { (*(F *)closure)(task); };
  crew.closure = &f;
  crew.tasks = tasks;
  crew.next = 0;
  crew.open = 1;
  __atomic_store_n(&crew.call, crew.call + 1, __ATOMIC_RELAXED);
  pthread_cond_broadcast(&crew.called);
  pthread_mutex_unlock(&crew.lock);
  take_tasks();
  for (int i = 0; i < SPINS && __atomic_load_n(&crew.active, __ATOMIC_RELAXED); i++) rest();
  pthread_mutex_lock(&crew.lock);
  crew.open = 0;
  while (crew.active) pthread_cond_wait(&crew.idle, &crew.lock);
  pthread_mutex_unlock(&crew.lock);
  pthread_mutex_unlock(&crew.taken);
}

} // namespace nk
#endif
