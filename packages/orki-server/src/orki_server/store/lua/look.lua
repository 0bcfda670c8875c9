-- look: a task as it is, and its progress after a cursor, as watchers want them. Reads only.
--
-- Arguments: task, most entries of progress (0 for none), cursor ("" for the beginning).
-- -> nothing for an unknown task; else the fields of LOOK, then for each entry its cursor, attempt, index, payload

local LOOK = {
  's', 'm', 'a', 'f', 'g', 'r', 'xc', 'xm', 'xt', 'e', 'su', 'eu', 'tp', 'n',
}

OPS.look = function(a)
  local values = redis.call('HMGET', TASK .. a[1], unpack(LOOK))
  if not values[1] then return {} end
  for at = 1, #LOOK do values[at] = values[at] or '' end
  if a[2] ~= '0' then
    local from = a[3] == '' and '-' or '(' .. a[3]
    -- The state was read before the progress: whoever sees a task's end has seen all that came before it.
    for _, entry in ipairs(redis.call('XRANGE', PROGRESS .. a[1], from, '+', 'COUNT', a[2])) do
      local fields = entry[2]
      for _, value in ipairs({ entry[1], fields[2], fields[4], fields[6] }) do values[#values + 1] = value end
    end
  end
  return values
end
