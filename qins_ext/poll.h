/* Ending long work early; threads.c has it. Apart from qins.h, since no kernel needs it. */
#ifndef QINS_POLL_H
#define QINS_POLL_H

/* While a thread has a poll, its calls of qins_parallel take their items in pieces of a few hundredths of a second. Now
 * and then this thread asks the poll between two pieces. Once that returns nonzero, what is left is skipped, and so are
 * later calls: results are undefined. poll NULL: no longer. Without a poll, qins_stopped() is 0. */
typedef int (*qins_poll)(void *context);
void qins_set_poll(qins_poll poll, void *context);
int qins_stopped(void);

#endif
