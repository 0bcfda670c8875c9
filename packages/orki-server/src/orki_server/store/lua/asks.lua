-- What submitters ask of running tasks.
-- -> word, state, agent, attempt, fence, attempt's traceparent, cancel grace (ms)

local function answer(word, task)
  if not task then return { word, '0', '', '0', '0', '', '0' } end
  return { word, task.s, task.g, whole(task.a), task.f, task.ap, whole(options(task).grace) }
end

-- id, message, actor -> unknown | ended | done (it had not been started) | asked | again
OPS.cancel = function(a)
  local task = load(a[1])
  if not task then return answer('unknown') end
  if ended(task) then return answer('ended', task) end
  if task.s == CANCELLING then return answer('again', task) end
  record(task, 'cancel_requested', { text = a[2], actor = a[3] })
  if task.s == QUEUED then
    end_as_cancelled(task, REASON_CANCELLED, a[2] ~= '' and a[2] or 'the task was cancelled')
    return answer('done', task)
  end
  task.s = CANCELLING
  save(task, 's', 'n')
  return answer('asked', task)
end

-- id, size of the directive, actor, fence that the directive is meant for -> unknown | ended | idle | running
OPS.direct = function(a)
  local task = load(a[1])
  if not task then return answer('unknown') end
  if ended(task) then return answer('ended', task) end
  if task.s ~= RUNNING or task.f ~= a[4] then return answer('idle', task) end
  record(task, 'directed', { number = tonumber(a[2]), actor = a[3] })
  save(task, 'n')
  return answer('running', task)
end
