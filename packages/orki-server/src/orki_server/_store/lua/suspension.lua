-- What a task keeps from one attempt for the next: checkpoints, suspensions and their answers.

-- A field of the task's hash that transitions do not read, with the changes of this batch; '' if it is not there.
local function kept(task, name)
  return task.fields[name] or redis.call('HGET', TASK .. task.id, name) or ''
end

-- What the offer of an attempt carries: '' for nothing, else '1' and the payload.
local function offered_checkpoint(task)
  if not more(task).checkpoint then return '' end
  local stored = kept(task, 'checkpoint')
  return '1' .. string.sub(stored, string.match(stored, '^%d+ %d+ ()') or 1)
end

-- As above; '0' if the last suspension ended without an answer.
local function offered_answer(task)
  local values = more(task)
  return values.answered and '1' .. kept(task, 'answer') or values.overdue and '0' or ''
end

-- id, fence, agent, number of the checkpoint within the attempt, payload
OPS.checkpoint = function(a)
  local task = held(a[1], a[2], a[3])
  if not task then return report_reply('stale') end
  local fence, number = string.match(more(task).checkpoint and kept(task, 'checkpoint') or '', '^(%d+) (%d+) ')
  if fence == a[2] and tonumber(number) >= tonumber(a[4]) then return report_reply('repeated', task) end
  refuse_if_full()
  move(task, 'Checkpointed')
  set(task, 'checkpoint', a[2] .. ' ' .. a[4] .. ' ' .. a[5])
  remember(task, { checkpoint = '1' })
  local began = begin(task)
  heard(task)
  if task.stall_due > 0 then task.stall_due = NOW + options(task).stall end
  sort(task, not began)
  return report_reply('accepted', task)
end

-- id, fence, agent, question, time after which the task goes on without an answer (ms; 0 for never)
OPS.suspend = function(a)
  local task, reply = reporting(a)
  if not task then return reply end
  move(task, 'AttemptSuspended')
  begin(task)
  task.result_fence, task.result_agent = a[2], a[3]
  if ended_by_cancel(task, 'the task was cancelled; its attempt was suspended') then
    return report_reply('accepted', task)
  end
  -- It did not fail, so it is not counted.
  task.started = task.started - 1
  suspend(task, a[4], tonumber(a[5]))
  return report_reply('accepted', task)
end

-- id, number of the suspension ("0": the current one), payload, actor
-- -> unknown | ended | idle (it is not suspended) | answered (it has another answer) | repeated | done
OPS.answer = function(a)
  local task = load(a[1])
  if not task then return task_reply('unknown') end
  local values, digest = more(task), redis.sha1hex(a[3])
  local is_current = not values.over_budget and (a[2] == '0' or a[2] == values.suspension)
  if is_current and values.answered == digest then return task_reply('repeated', task) end
  if MOVES[task.state].Forgotten then return task_reply('ended', task) end
  if not is_current or not MOVES[task.state].Answered then
    return task_reply(is_current and values.answered and 'answered' or 'idle', task)
  end
  refuse_if_full()
  move(task, 'Answered')
  set(task, 'answer', a[3])
  remember(task, { answered = digest })
  resume(task, { number = #a[3], actor = a[4] })
  return task_reply('done', task)
end

-- Completes a move of a task that waited for its budget to QUEUED.
local function admit(task)
  move(task, 'BudgetRaised')
  resume(task, { text = 'the budget was raised' })
  remember(task, { over_budget = '' })
end

-- id, fence, agent, message, "1" if the budget was raised meanwhile, "1" if the offer was never sent: the attempt ended
-- because a budget is used up
OPS.over_budget = function(a)
  local task, reply = reporting(a)
  if not task then return reply end
  move(task, 'AttemptSuspended')
  if a[6] ~= '1' then
    begin(task)
    task.result_fence, task.result_agent = a[2], a[3]
    task.started = task.started - 1 -- It did not fail, so it is not counted.
  end
  if ended_by_cancel(task, 'the task was cancelled; its attempt was paused by a budget') then
    return report_reply('accepted', task)
  end
  record(task, 'suspended', { reason = REASON_OVER_BUDGET, text = a[4] })
  local left = task.total_due > 0 and whole(math.max(1, task.total_due - NOW)) or ''
  stop_timers(task)
  task.suspected = ''
  remember(task, { over_budget = '1', total_left = left })
  sort(task)
  if a[5] ~= '1' then return report_reply('accepted', task) end
  admit(task)
  return report_reply('accepted', task, 0)
end

-- id, attempt: the budget admits the task -> running (the attempt may still wait for it) | admitted | gone, method
OPS.resume_budget = function(a)
  local task = load(a[1])
  if not task then return { 'gone', '' } end
  if HELD[task.state] and whole(task.attempt) == a[2] then return { 'running', '' } end
  if task.state ~= 'SUSPENDED' or not more(task).over_budget then return { 'gone', '' } end
  admit(task)
  return { 'admitted', task.method }
end
